#!/usr/bin/env python3
"""One rival answering with PVT v2 on made-up pictures: what tests/bench/compare_speed measures us against.

Engines: torch-fp32, torch-bf16 (autocast), onnxruntime-fp32, openvino-fp32, openvino-bf16. Prints one JSON object. The network is exported
with a fixed batch (with a dynamic one OpenVINO runs at 0.4 of that), to a file in --cache that later runs use again. Two calls don't count.
ISA limits that a user can set: ONEDNN_MAX_CPU_ISA for OpenVINO and PyTorch; ONNX Runtime has none.
"""
import argparse
import json
import os
import resource
import tempfile
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["torch-fp32", "torch-bf16", "onnxruntime-fp32", "openvino-fp32", "openvino-bf16"])
    parser.add_argument("--variant", default="pvt_v2_b0")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--cache", default=os.path.join(tempfile.gettempdir(), "pyramid-bench-onnx"))
    args = parser.parse_args()

    import numpy
    image = numpy.random.default_rng(0).standard_normal((args.batch, 3, args.size, args.size)).astype(numpy.float32)
    path = os.path.join(args.cache, f"{args.variant}_{args.batch}_{args.size}.onnx")
    if args.engine.startswith("torch") or not os.path.exists(path):
        import timm
        import torch
        torch.manual_seed(0)
        torch.set_num_threads(args.threads)
        model = timm.create_model(args.variant, pretrained=False).eval()
    if not args.engine.startswith("torch") and not os.path.exists(path):
        os.makedirs(args.cache, exist_ok=True)
        torch.onnx.export(model, (torch.from_numpy(image),), path + ".part", dynamo=False, opset_version=17)
        os.rename(path + ".part", path)

    if args.engine.startswith("torch"):
        tensor = torch.from_numpy(image)

        def call():
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=args.engine == "torch-bf16"):
                model(tensor)
    elif args.engine == "onnxruntime-fp32":
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def call():
            session.run(None, {name: image})
    else:
        import openvino
        core = openvino.Core()
        hint = {"openvino-fp32": "f32", "openvino-bf16": "bf16"}[args.engine]
        request = core.compile_model(core.read_model(path), "CPU", {
            "INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()

        def call():
            request.infer([image])

    call()
    call()
    seconds = []
    start = time.perf_counter()
    while time.perf_counter() - start < args.seconds or len(seconds) < 3:
        before = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - before)
    print(json.dumps({
        "engine": args.engine, "variant": args.variant, "batch": args.batch, "size": args.size, "threads": args.threads,
        "images_per_second": round(args.batch / sorted(seconds)[len(seconds) // 2], 2), "calls": len(seconds),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))


if __name__ == "__main__":
    main()
