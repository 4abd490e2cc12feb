#!/usr/bin/env python3
"""FastAPI and uvicorn in front of OpenVINO in bf16: what tests/bench/compare_serving measures us against. POST /jpeg and /tensor.

  peer_fastapi.py PORT ONNX_FOLDER|null THREADS

`async def` with the blocking call inside, the fastest of the usual forms; uvloop and httptools; no access log. The answer is the five best classes.
"""
import io
import os
import sys

import numpy
import uvicorn
from fastapi import FastAPI, Request, Response

from peer_network import Network, prepare

PORT, FOLDER, THREADS = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
network = None if FOLDER == "null" else Network(FOLDER, THREADS, [1])
app = FastAPI()


def answer(tensor):
    logits = numpy.zeros((1, 1000), numpy.float32) if network is None else network.logits(tensor)
    best = numpy.argpartition(-logits[0], 5)[:5]
    return Response(b"[" + b",".join(str(int(index)).encode() for index in best) + b"]", media_type="application/json")


@app.post("/tensor")
async def tensor(request: Request):
    return answer(numpy.frombuffer(await request.body(), numpy.float32).reshape(1, 3, 224, 224))


@app.post("/jpeg")
async def jpeg(request: Request):
    return answer(prepare(io.BytesIO(await request.body()))[None])


@app.get("/ready")
async def ready():
    return os.getpid()


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
