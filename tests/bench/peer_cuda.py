#!/usr/bin/env python3
"""timm's PVT v2 on a card, eager and by torch.compile, inference and training step: the rivals that cuda_bench can't be itself.

  peer_cuda.py [--seconds X] [--variants pvt_v2_b0 …]      224x224, bf16 autocast, channels as timm has them

Prints rows for docs/performance.md: pictures a second, medians of seven rounds in turns. Needs torch with a card, and timm.
"""
import argparse
import statistics
import sys
import time

ROUNDS = 7


def seconds_of(torch, run, budget):
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    runs = max(1, int(budget / max(time.perf_counter() - start, 1e-6)))
    start = time.perf_counter()
    for _ in range(runs):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs


def row(torch, work, batch, contestants, budget):
    times = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            times[name].append(seconds_of(torch, run, budget / ROUNDS))
    print(f"| {work} |" + "".join(f" {name} {batch / statistics.median(each):.0f} |" for name, each in times.items()), flush=True)


def blocks(torch, variant, model, budget):
    """The first block of each stage, alone: cuda_bench has ours."""
    for index, stage in enumerate(model.stages):
        side = 56 >> index
        block = stage.blocks[0].eval()
        compiled = torch.compile(block)
        tokens = torch.randn(32, side * side, stage.norm.normalized_shape[0], device="cuda")

        def infer(call, tokens=tokens, side=side):
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                call(tokens, (side, side))

        row(torch, f"timm {variant} block of stage {index + 1}, batch 32, bf16 autocast, pictures/s", 32,
            {"eager": lambda: infer(block), "torch.compile": lambda: infer(compiled)}, budget)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--variants", nargs="+", default=["pvt_v2_b0", "pvt_v2_b2"])
    args = parser.parse_args()
    try:
        import timm
        import torch
    except ImportError as error:
        sys.exit(f"peer_cuda: {error}; pip install timm")
    if not torch.cuda.is_available():
        sys.exit("peer_cuda: torch sees no card")

    for variant in args.variants:
        torch.manual_seed(0)
        model = timm.create_model(variant, pretrained=False).cuda()
        compiled = torch.compile(model)
        reduced = torch.compile(model, mode="reduce-overhead")  # CUDA graphs
        for batch in (1, 32):
            pixels = torch.randn(batch, 3, 224, 224, device="cuda")

            def infer(network, pixels=pixels):
                with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                    network(pixels)

            model.eval()
            row(torch, f"timm {variant} inference, batch {batch}, bf16 autocast, pictures/s", batch,
                {"eager": lambda: infer(model), "torch.compile": lambda: infer(compiled), "torch.compile with graphs": lambda: infer(reduced)},
                args.seconds)
        blocks(torch, variant, model, args.seconds)
        labels = torch.arange(32, device="cuda")

        def step(network):
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(network(pixels), labels)
            torch.autograd.grad(loss, list(model.parameters()))

        model.train()
        row(torch, f"timm {variant} forward and backward, batch 32, bf16 autocast, pictures/s", 32,
            {"eager": lambda: step(model), "torch.compile": lambda: step(compiled)}, args.seconds)


main()
