#!/usr/bin/env python3
"""torchvision on Pillow, from a JPEG's bytes to 3x224x224 floats: what tests/bench/compare_preprocess measures us against.

The evaluation transform of timm and the official code: Resize(248, bicubic, antialiased), CenterCrop(224), ToTensor, Normalize. One
thread. Prints one JSON object; images_per_second is per second of this process's CPU time.
"""
import argparse
import io
import json
import resource
import time

import PIL
import torch
import torchvision
from PIL import Image
from torchvision import transforms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture")
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    with open(args.picture, "rb") as file:
        data = file.read()
    transform = transforms.Compose([
        transforms.Resize(248, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])

    def prepare():
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    for _ in range(10):
        prepare()
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < args.seconds:
        for _ in range(10):
            prepare()
        count += 10
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({
        "program": f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}", "images_per_second": round(count / cpu, 1),
        "per_second": round(count / wall, 1), "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))


if __name__ == "__main__":
    main()
