"""The schemas of torch_npu's fused attention and its gradient, in the library of the wheel on PyPI, are those of tests/golden/npu_schemas.txt,
which the fake NPU of tests/testing registers and model/npu_attention.cc was written against; and the library brings the gradient along.

torch_npu isn't imported: its library needs Ascend's CANN. With --write (run by the Python of that environment) the golden file is
written anew.
"""
import importlib.metadata
import importlib.util
import os
import re
import sys

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "golden", "npu_schemas.txt")
NAMES = ["npu_fusion_attention", "npu_fusion_attention_grad"]
# The function that differentiates the operator, generated into torch_npu's VariableType.
GRADIENT = b"N6at_npu8autograd12VariableType20npu_fusion_attentionE"


def schema(library, name):
    """The one text in the library that begins like a schema of `name`."""
    texts = set(re.findall(rb"(?<![\x20-\x7e])" + name.encode() + rb"\(Tensor [\x20-\x7e]*\) -> \([\x20-\x7e]*\)", library))
    if len(texts) != 1:
        sys.exit(f"npu_schema: {len(texts)} schemas of {name} in the library")
    return texts.pop().decode()


def main():
    folder = importlib.util.find_spec("torch_npu").submodule_search_locations[0]
    with open(os.path.join(folder, "lib", "libtorch_npu.so"), "rb") as file:
        library = file.read()
    ours = [schema(library, name) for name in NAMES]
    if "--write" in sys.argv:
        with open(GOLDEN, "w") as file:
            file.write("\n".join(ours) + "\n")
    with open(GOLDEN) as file:
        golden = file.read().splitlines()
    version = importlib.metadata.version("torch_npu")
    failed = golden != ours
    for name, expected, actual in zip(NAMES, golden, ours):
        print(f"{name}: torch_npu {version}'s schema, {actual.count('=')} arguments with defaults: "
              f"{'the golden one' if expected == actual else 'ANOTHER'}")
        if expected != actual:
            print(f"  golden {expected}\n  theirs {actual}")
    if GRADIENT not in library:
        print("npu_fusion_attention: torch_npu has no gradient for it")
        failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
