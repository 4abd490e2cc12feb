"""A pyramid-server with pvt_v2_b0 in formula weights (1000 classes) as model "pvt", for the peers' scripts. Needs numpy and safetensors."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
from safetensors.numpy import save_file

import formula
import pyramid

_grpc = None  # of the server that runs
_starts = 0


def pictures(batch, height, width):
    return formula.image(batch, height, width)


def _weights():
    with open(os.path.join(pyramid.GOLDEN, "parameter_names.json")) as text:
        names = json.load(text)["timm 1.0.31"]["pvt_v2_b0"]
    arrays = formula.weights({name: tuple(shape) for name, shape in names}, "timm")
    path = pyramid.path("pvt.safetensors")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    return path


@contextlib.contextmanager
def running(*flags):
    """The server's gRPC and HTTP addresses."""
    global _grpc, _starts
    _starts += 1
    data = pyramid.path(f"data{_starts}")
    os.makedirs(os.path.join(data, "models", "pvt"))
    pyramid.convert(_weights(), os.path.join(data, "models", "pvt", "1"))
    program = os.path.join(os.path.dirname(pyramid.PROGRAM), "pyramid-server")
    with open(pyramid.path("server.log"), "wb") as log:
        process = subprocess.Popen([program, "--data", data, "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", *flags], stderr=log)
        try:
            announced = os.path.join(data, "server.json")
            for _ in range(600):
                if os.path.exists(announced) or process.poll() is not None:
                    break
                time.sleep(0.05)
            else:
                sys.exit("peers: the server didn't start in 30 s")
            if process.poll() is not None:
                sys.exit(f"peers: the server ended: {open(log.name).read()[-2000:]}")
            addresses = json.load(open(announced))
            _grpc = addresses["grpc"]
            yield addresses["grpc"], addresses["http"]
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    pyramid.report("the server ends when asked", f"exit code {code}", code == 0)


def native_logits(contents):
    """What `pyramid classify` says of these files through the server."""
    paths = []
    for i, content in enumerate(contents):
        paths.append(pyramid.path(f"picture{i}"))
        with open(paths[-1], "wb") as file:
            file.write(content)
    return np.array(json.loads(pyramid.run("classify", "--server", _grpc, "--model", "pvt", "--logits", "--json", *paths))["logits"])
