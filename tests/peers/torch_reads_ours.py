"""PyTorch and timm read files that `pyramid convert` wrote: nothing missing, the same bits, the golden logits."""
import safetensors.numpy
import safetensors.torch
import timm
import timm.models.pvt_v2
import torch

import formula
import pyramid


def read(file):
    return safetensors.torch.load_file(file) if file.endswith(".safetensors") else torch.load(file, weights_only=True)


def main():
    torch.set_num_threads(2)
    cases = pyramid.golden("logits_torch.json")
    for variant in sorted({case["variant"] for case in cases}):
        model = timm.create_model(variant).eval()
        wanted = formula.weights({name: tensor.shape for name, tensor in model.state_dict().items()}, "timm")
        officially = {formula.official(name, "timm"): tensor for name, tensor in wanted.items()}
        source = pyramid.path(variant + ".safetensors")
        safetensors.numpy.save_file(officially, source)
        for naming, ending in (("official", ".pth"), ("timm", ".pth"), ("official", ".safetensors"), ("timm", ".safetensors")):
            what = f"{variant} {naming} {ending}"
            file = pyramid.convert(source, pyramid.path(f"{variant}-{naming}{ending}"), "--naming", naming)
            state = read(file)
            pyramid.same(what, wanted if naming == "timm" else officially, {name: tensor.numpy() for name, tensor in state.items()})
            # timm's loader of pretrained files, which takes official names too.
            model = timm.create_model(variant, pretrained=True, pretrained_cfg_overlay={"file": file}).eval()
            pyramid.same(what + " in timm", wanted, {name: tensor.numpy() for name, tensor in model.state_dict().items()})
            if naming == "timm":
                model.load_state_dict(state, strict=True)
        for case in (case for case in cases if case["variant"] == variant):
            size = case["batch"], case["height"], case["width"]
            pictures = formula.image(*size)
            with torch.inference_mode():
                theirs = model(torch.from_numpy(pictures)).numpy()
            pyramid.compare(f"{variant} {'x'.join(map(str, size))}, timm with our file against golden", theirs, case["logits"], 2e-5)
            pyramid.compare(f"{variant} {'x'.join(map(str, size))}, ours with our file against golden", pyramid.logits(file, pictures),
                            case["logits"], 2e-5)
    pyramid.finish()


main()
