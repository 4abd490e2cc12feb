"""Triton's load tool against our server, unchanged: gRPC and HTTP, synchronous and asynchronous, with the server's statistics. It fills floats with
random bits, NaN among them, so the server is told to answer those (serving.refuse_non_finite: false); once it sends zeros to one that isn't.

Its wheel needs glibc 2.38; where it doesn't install, the program is the one that came with tritonclient 2.44 (2024), which needs libb64 (Debian:
apt-get install libb64-0d). Without that nothing is run, and the output says so. PYRAMID_PERF_ANALYZER=FILE is the program itself."""
import base64
import csv
import ctypes
import json
import os
import platform
import shutil
import struct
import subprocess
import sys

import pyramid
import server

PACKAGE = "perf-analyzer==2.60.0"
OLDER = ["tritonclient==2.44.0", "nvidia-cuda-runtime-cu12==12.9.79"]  # the second for libcudart.so.12
RUNS = {
    "grpc": ["-i", "grpc", "--concurrency-range", "2"],
    "grpc, batches of 4": ["-i", "grpc", "--concurrency-range", "2", "-b", "4"],
    "grpc, asynchronous": ["-i", "grpc", "--async", "--concurrency-range", "8"],
    "grpc, at a rate": ["-i", "grpc", "--request-rate-range", "20"],
    "http": ["-i", "http", "--concurrency-range", "2"],
    "http, asynchronous": ["-i", "http", "--async", "--concurrency-range", "4"],
}


def program():
    """The tool's path; none: it doesn't run here."""
    given = os.environ.get("PYRAMID_PERF_ANALYZER")
    if given:
        return given
    installed = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if installed.returncode == 0:
        return shutil.which("perf_analyzer", path=os.path.dirname(sys.executable))
    print(f"{PACKAGE} doesn't install here; its wheel needs glibc 2.38, this is {' '.join(platform.libc_ver())}")
    return older_program()


def older_program():
    try:
        ctypes.CDLL("libb64.so.0d")
    except OSError:
        print("not run: the older program needs libb64; apt-get install libb64-0d")
        return None
    folder = pyramid.path("older")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", "--target", folder, *OLDER], check=True)
    libraries = os.path.join(folder, "nvidia", "cuda_runtime", "lib")
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [libraries, os.environ.get("LD_LIBRARY_PATH")]))
    return os.path.join(folder, "bin", "perf_analyzer")


def files():
    """--input-data of JPEGs: elements of a BYTES tensor, each with its length before it."""
    data = []
    for name in ("scene.jpg", "exif_6.jpg", "gray.jpg"):
        with open(os.path.join(pyramid.GOLDEN, "images", name), "rb") as file:
            content = file.read()
        data.append({"image": {"content": {"b64": base64.b64encode(struct.pack("<I", len(content)) + content).decode()}, "shape": [1]}})
    with open(pyramid.path("files.json"), "w") as file:
        json.dump({"data": data}, file)
    return pyramid.path("files.json")


def run(tool, name, flags, address, model="pvt"):
    table = pyramid.path("table.csv")
    if os.path.exists(table):
        os.remove(table)
    done = subprocess.run([tool, "-m", model, "-u", address, *flags, "--measurement-interval", "3000", "--stability-percentage", "90", "-f", table],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    rows = list(csv.DictReader(open(table))) if os.path.exists(table) else []
    if done.returncode != 0 or not rows:
        return pyramid.report(f"perf_analyzer, {name}", f"exit code {done.returncode}: {done.stdout[-600:]}", False)
    row = rows[0]
    found = float(row["Inferences/Second"]), float(row["Server Compute Infer"])
    pyramid.report(f"perf_analyzer, {name}",
                   f"{found[0]:.1f} pictures/s; of a request: queue {row['Server Queue']} µs, input {row['Server Compute Input']} µs, "
                   f"infer {row['Server Compute Infer']} µs, output {row['Server Compute Output']} µs", found[0] > 0 and found[1] > 0)


def main():
    tool = program()
    if tool is None:
        sys.exit(77)  # skipped
    config = pyramid.path("server.yaml")
    with open(config, "w") as file:
        file.write("serving: {refuse_non_finite: false}\n")
    with server.running("--config", config) as (grpc_address, http_address):
        for name, flags in RUNS.items():
            run(tool, name, flags, grpc_address if "grpc" in name else http_address)
    with server.running() as (grpc_address, _):
        run(tool, "grpc, zeros to a server as it comes", ["-i", "grpc", "--concurrency-range", "2", "--input-data", "zero"], grpc_address)
        run(tool, "grpc, JPEGs", ["-i", "grpc", "--concurrency-range", "4", "--input-data", files()], grpc_address, "pvt:files")
        run(tool, "grpc, JPEGs by twos", ["-i", "grpc", "--concurrency-range", "2", "-b", "2", "--input-data", files()], grpc_address, "pvt:files")
    pyramid.finish()


main()
