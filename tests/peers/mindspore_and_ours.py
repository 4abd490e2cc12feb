"""MindSpore with MindCV reads our .ckpt, and we read what MindSpore saves: nothing missing, the same bits, the same logits."""
import mindspore as ms
import numpy as np
import safetensors.numpy

import formula
import mindspore_network as theirs
import pyramid


def main():
    cases = pyramid.golden("logits_mindcv.json")
    for variant in sorted({case["variant"] for case in cases}):
        network = theirs.create(variant)
        wanted = formula.weights({name: array.shape for name, array in theirs.arrays(network).items()}, "mindcv")
        source = pyramid.path(variant + ".safetensors")
        safetensors.numpy.save_file({formula.official(name, "mindcv"): array for name, array in wanted.items()}, source)
        file = pyramid.convert(source, pyramid.path(variant + ".ckpt"), "--naming", "mindcv", "--origin", "mindcv")

        left_out = theirs.load(network, file)
        pyramid.report(f"{variant} .ckpt of ours in MindSpore, strict", f"{len(left_out)} names left out {left_out[:3]}", not left_out)
        pyramid.same(f"{variant} .ckpt of ours in MindSpore", wanted, theirs.arrays(network))
        for case in (case for case in cases if case["variant"] == variant):
            size = case["batch"], case["height"], case["width"]
            pictures = formula.image(*size)
            what = f"{variant} {'x'.join(map(str, size))}"
            answer = theirs.logits(network, pictures)
            pyramid.compare(what + ", MindSpore with our file against golden", answer, case["logits"], 2e-5)
            pyramid.compare(what + ", MindSpore against ours, our file", answer, pyramid.logits(file, pictures), 2e-5)

        # The way in: what MindSpore saves itself.
        pictures = formula.image(1, 64, 64)
        answer = theirs.logits(network, pictures)
        ms.save_checkpoint(network, pyramid.path("theirs.ckpt"))
        pyramid.compare(f"{variant} MindSpore's .ckpt, read by us", answer, pyramid.logits(pyramid.path("theirs.ckpt"), pictures), 2e-5)
        ms.save_checkpoint(network, pyramid.path("checked.ckpt"), crc_check=True)
        pyramid.compare(f"{variant} MindSpore's .ckpt with CRC, read by us", answer, pyramid.logits(pyramid.path("checked.ckpt"), pictures), 2e-5)
        ms.save_checkpoint(network, pyramid.path("theirs"), format="safetensors")
        pyramid.compare(f"{variant} MindSpore's safetensors, read by us", answer,
                        pyramid.logits(pyramid.path("theirs.safetensors"), pictures), 2e-5)
        training = [{"name": name, "data": parameter} for name, parameter in network.parameters_dict().items()]
        training += [{"name": "adam_m." + name, "data": ms.Tensor(np.zeros_like(array))} for name, array in wanted.items()]
        training += [{"name": "global_step", "data": ms.Tensor(np.array([7], np.int32))}]
        ms.save_checkpoint(training, pyramid.path("training.ckpt"), append_dict={"epoch_num": 3})
        pyramid.compare(f"{variant} MindSpore's .ckpt of a train cell, read by us", answer,
                        pyramid.logits(pyramid.path("training.ckpt"), pictures), 2e-5)
    pyramid.finish()


main()
