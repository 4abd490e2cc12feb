#!/usr/bin/env python3
"""One process of PyTorch with timm's PVT v2, training on made-up pictures: what tests/bench/compare_train measures us against.

Needs torch and timm (compare_train says how to get them). Prints one JSON object: images per second (pictures of a step over the
median step), steps, batch, size, threads, peak memory. The first two steps don't count.
"""
import argparse
import json
import os
import resource
import time

import timm
import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="pvt_v2_b0")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    model = timm.create_model(args.variant, num_classes=args.classes, drop_path_rate=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    images = torch.randn(args.batch, 3, args.size, args.size)
    labels = torch.randint(args.classes, (args.batch,))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()

    step()
    step()
    seconds = []
    start = time.perf_counter()
    while time.perf_counter() - start < args.seconds or len(seconds) < 3:
        before = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - before)
    median = sorted(seconds)[len(seconds) // 2]
    print(json.dumps({
        "program": f"torch {torch.__version__}, timm {timm.__version__}", "variant": args.variant, "batch": args.batch, "size": args.size,
        "classes": args.classes, "dtype": args.dtype, "threads": args.threads, "images_per_second": round(args.batch / median, 1),
        "steps": len(seconds), "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))


if __name__ == "__main__":
    main()
