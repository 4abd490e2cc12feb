"""What PyTorch and timm save, in every form people use, is read here: the logits are timm's."""
import argparse

import safetensors.torch
import timm
import torch

import formula
import pyramid

VARIANT = "pvt_v2_b0"


def state_of(model, dtype=torch.float32):
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def officially(state):
    return {formula.official(name, "timm"): tensor for name, tensor in state.items()}


def trained_state(model):
    """An optimizer's state after a step, as training files carry it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def files(model):
    """(what, file's ending, save, dtype whose rounding the logits show, flags)."""
    state = state_of(model)
    other = {name: tensor + 0.5 for name, tensor in state.items()}
    # Strides: a transposed, a channels-last and an expanded tensor, two views of one storage.
    strided = dict(state)
    strided["head.weight"] = state["head.weight"].t().contiguous().t()
    strided["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].contiguous(memory_format=torch.channels_last)
    both = torch.cat([state["stages.0.norm.weight"], state["stages.0.norm.bias"]])
    strided["stages.0.norm.weight"], strided["stages.0.norm.bias"] = both[:32], both[32:]
    legacy = {"_use_new_zipfile_serialization": False}
    optimizer = trained_state(model)
    train = {"optimizer": optimizer, "lr_scheduler": {"last_epoch": 3}, "epoch": 3, "scaler": {"scale": 65536.0}}
    f32 = torch.float32
    yield "zip", ".pth", lambda f: torch.save(state, f), f32, ()
    yield "legacy", ".pth", lambda f: torch.save(state, f, **legacy), f32, ()
    yield "zip, official names", ".pt", lambda f: torch.save(officially(state), f), f32, ()
    yield "zip, ordered dict with metadata", ".pth", lambda f: torch.save(model.state_dict(), f), f32, ()
    yield "zip, parameters", ".pth", lambda f: torch.save(dict(model.named_parameters()), f), f32, ()
    yield "zip, pickle protocol 4", ".pth", lambda f: torch.save(state, f, pickle_protocol=4), f32, ()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        low = state_of(model, dtype)
        yield f"zip, {dtype}", ".pth", lambda f, low=low: torch.save(low, f), dtype, ()
        yield f"legacy, {dtype}", ".pth", lambda f, low=low: torch.save(low, f, **legacy), dtype, ()
        yield f"safetensors, {dtype}", ".safetensors", lambda f, low=low: safetensors.torch.save_file(low, f), dtype, ()
    yield "zip, DDP", ".pth", lambda f: torch.save(prefixed(state, "module."), f), f32, ()
    yield "legacy, DDP", ".pth", lambda f: torch.save(prefixed(state, "module."), f, **legacy), f32, ()
    yield "zip, compiled", ".pth", lambda f: torch.save(prefixed(state, "_orig_mod."), f), f32, ()
    yield "zip, strided and shared", ".pth", lambda f: torch.save(strided, f), f32, ()
    yield "legacy, strided and shared", ".pth", lambda f: torch.save(strided, f, **legacy), f32, ()
    yield "official training file", ".pth", lambda f: torch.save({"model": officially(state), **train}, f), f32, ()
    yield ("official training file with its arguments", ".pth",
           lambda f: torch.save({"model": officially(state), **train, "args": argparse.Namespace(lr=0.001, model=VARIANT)}, f), f32, ())
    yield "timm training file", ".pth.tar", lambda f: torch.save({"state_dict": state, "state_dict_ema": other, "arch": VARIANT, **train}, f), f32, ()
    yield ("timm training file, averaged", ".pth.tar",
           lambda f: torch.save({"state_dict": other, "state_dict_ema": prefixed(state, "module."), "arch": VARIANT, **train}, f), f32, ("--ema",))
    yield "legacy training file", ".pth.tar", lambda f: torch.save({"state_dict": prefixed(state, "module."), **train}, f, **legacy), f32, ()


def main():
    torch.set_num_threads(2)
    model = timm.create_model(VARIANT).eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in formula.weights(shapes, "timm").items()})
    pictures = formula.image(1, 64, 64)
    theirs = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        rounded = timm.create_model(VARIANT).eval()
        rounded.load_state_dict(state_of(model, dtype))
        with torch.inference_mode():
            theirs[dtype] = rounded(torch.from_numpy(pictures)).numpy()
    for number, (what, ending, save, dtype, flags) in enumerate(files(model)):
        file = pyramid.path(f"file{number}{ending}")
        save(file)
        pyramid.compare(what, theirs[dtype], pyramid.logits(file, pictures, *flags), 2e-5)
    pyramid.finish()


main()
