"""Formula weights and pictures (the rule is in tests/golden/README.md), and the parameters' names in other code bases. Needs numpy."""
import re

import numpy as np


def levels(name, count):
    """`count` numbers in [-1, 1]: the top bytes of SplitMix64, seeded with the name's FNV-1a 64."""
    mask = 2**64 - 1
    state = 14695981039346656037
    for byte in name.encode("utf-8"):
        state = (state ^ byte) * 1099511628211 & mask
    gamma = 0x9E3779B97F4A7C15
    # All states at once: uint64 arithmetic wraps around as the generator's does.
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(gamma) + np.uint64(state)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(56)) - 127.5) / 127.5


def parameter(name, shape):
    """A parameter by its official name."""
    size = 1
    for side in shape:
        size *= side
    u = levels(name, size)
    if name.endswith(".bias"):
        u = 0.1 * u
    elif len(shape) == 1:
        u = 1 + 0.25 * u
    else:
        u = u * np.sqrt(3.0 * shape[0] / size)
    return u.reshape(shape).astype(np.float32)


def image(batch, height, width, channels=3):
    name = f"input:{batch}x{channels}x{height}x{width}"
    return (2 * levels(name, batch * channels * height * width)).reshape(batch, channels, height, width).astype(np.float32)


# Each scheme's own spelling by pattern, and what it is officially; {} is an index counted from 1 there, from 0 elsewhere.
_PLACES = {
    "timm": [
        (r"patch_embed\.(.*)", lambda m: f"patch_embed1.{m[1]}"),
        (r"stages\.(\d+)\.downsample\.(.*)", lambda m: f"patch_embed{int(m[1]) + 1}.{m[2]}"),
        (r"stages\.(\d+)\.blocks\.(.*)", lambda m: f"block{int(m[1]) + 1}.{m[2].replace('mlp.dwconv.', 'mlp.dwconv.dwconv.')}"),
        (r"stages\.(\d+)\.norm\.(.*)", lambda m: f"norm{int(m[1]) + 1}.{m[2]}"),
    ],
    "mindcv": [
        (r"patch_embed_list\.(\d+)\.(.*)", lambda m: f"patch_embed{int(m[1]) + 1}.{m[2]}"),
        (r"block_list\.(\d+)\.(.*)", lambda m: f"block{int(m[1]) + 1}.{m[2]}"),
        (r"norm_list\.(\d+)\.(.*)", lambda m: f"norm{int(m[1]) + 1}.{m[2]}"),
    ],
    "transformers": [
        (r"pvt_v2\.encoder\.layers\.(\d+)\.patch_embedding\.(.*)", lambda m: f"patch_embed{int(m[1]) + 1}.{m[2]}"),
        (r"pvt_v2\.encoder\.layers\.(\d+)\.blocks\.(.*)", lambda m: f"block{int(m[1]) + 1}.{m[2]}"),
        (r"pvt_v2\.encoder\.layers\.(\d+)\.layer_norm\.(.*)", lambda m: f"norm{int(m[1]) + 1}.{m[2]}"),
    ],
}
_WORDS = {
    "timm": [],
    "mindcv": [(".gamma", ".weight"), (".beta", ".bias")],
    "transformers": [
        ("layer_norm_1", "norm1"), ("layer_norm_2", "norm2"), ("layer_norm", "norm"), (".attention.", ".attn."), (".query.", ".q."),
        (".spatial_reduction.", ".sr."), (".dense1.", ".fc1."), (".dense2.", ".fc2."), ("classifier.", "head."),
    ],
}


def official(name, scheme):
    """The official name of a parameter; transformers' key and value keep theirs (attn.key, attn.value)."""
    for pattern, rewrite in _PLACES[scheme]:
        match = re.fullmatch(pattern, name)
        if match:
            name = rewrite(match)
            break
    for theirs, ours in _WORDS[scheme]:
        name = name.replace(theirs, ours)
    return name


def weights(shapes, scheme):
    """{name: array} for {name: shape}, names and layout of `scheme`."""
    made = {}
    for name, shape in shapes.items():
        place = official(name, scheme)
        part = re.search(r"\.attn\.(key|value)\.", place)
        if part is None:
            made[name] = parameter(place, tuple(shape))
            continue
        whole = parameter(place.replace(part[1], "kv"), (2 * shape[0],) + tuple(shape[1:]))
        made[name] = whole[:shape[0]] if part[1] == "key" else whole[shape[0]:]
    return made
