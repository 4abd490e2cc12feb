"""The loop of a MindCV user: MindSpore's .ckpt in, two training steps here on another class count, .ckpt out, the same logits in MindSpore."""
import os

import mindspore as ms
import numpy as np
from PIL import Image

import formula
import mindspore_network as theirs
import pyramid

VARIANT = "pvt_v2_b0"
CLASSES = 4
RECIPE = """
model: {variant}
compat: mindcv
ckpt_path: {weights}
dataset: imagenet
data_dir: {data}
image_resize: 64
batch_size: 8
epoch_size: 1
num_parallel_workers: 1
shuffle: True
hflip: 0.5
color_jitter: 0
lr: 0.0001
min_lr: 0.00001
warmup_epochs: 0
decay_epochs: 1
weight_decay: 0.05
label_smoothing: 0.1
ckpt_save_dir: {out}
log_interval: 1
mode: F
"""


def write_pictures(folder):
    """16 for training, which are two steps, and 4 for validation."""
    for split, each in (("train", 4), ("val", 1)):
        for label in range(CLASSES):
            place = os.path.join(folder, split, f"class{label}")
            os.makedirs(place)
            for number in range(each):
                noise = (formula.levels(f"{split}{label}{number}", 80 * 72 * 3) * 60 + 60 + 40 * label).clip(0, 255)
                Image.fromarray(noise.astype(np.uint8).reshape(72, 80, 3)).save(os.path.join(place, f"{number}.png"))


def main():
    network = theirs.create(VARIANT)
    shapes = {name: array.shape for name, array in theirs.arrays(network).items()}
    for name, array in formula.weights(shapes, "mindcv").items():
        network.parameters_dict()[name].set_data(ms.Tensor(array))
    before = pyramid.path("before.ckpt")
    ms.save_checkpoint(network, before)

    write_pictures(pyramid.path("data"))
    with open(pyramid.path("recipe.yaml"), "w") as file:
        file.write(RECIPE.format(variant=VARIANT, weights=before, data=pyramid.path("data"), out=pyramid.path("out")))
    pyramid.run("train", "-c", pyramid.path("recipe.yaml"))
    checkpoints = sorted(name for name in os.listdir(pyramid.path("out")) if name.startswith("step-"))
    pyramid.report("trained here", f"checkpoints {checkpoints}", checkpoints == ["step-00000002"])
    tuned = os.path.join(pyramid.path("out"), checkpoints[-1])

    after = pyramid.convert(tuned, pyramid.path("after.ckpt"))
    small = theirs.create(VARIANT, CLASSES)
    left_out = theirs.load(small, after)
    pyramid.report("fine-tuned .ckpt in MindSpore, strict", f"{len(left_out)} names left out {left_out[:3]}", not left_out)
    pyramid.same("fine-tuned .ckpt by MindCV's loader", theirs.arrays(small), theirs.arrays(theirs.create(VARIANT, CLASSES, after)))
    moved = max(float(np.abs(array - formula.parameter(formula.official(name, "mindcv"), array.shape)).max())
                for name, array in theirs.arrays(small).items() if not name.startswith("head."))
    pyramid.report("training moved the weights", f"by up to {moved:.1e}", moved > 1e-5)
    for size in ((2, 64, 64), (1, 224, 224), (1, 225, 225)):
        pictures = formula.image(*size)
        answer = theirs.logits(small, pictures)
        what = f"fine-tuned, {'x'.join(map(str, size))}, MindSpore against ours"
        pyramid.compare(what + ", the checkpoint", answer, pyramid.logits(tuned, pictures), 1e-5)
        pyramid.compare(what + ", the .ckpt", answer, pyramid.logits(after, pictures), 1e-5)
    pyramid.finish()


main()
