"""TorchServe in front of OpenVINO in bf16: the handler that tests/bench/compare_serving archives. The answer is the five best classes.

Environment: PEER_FOLDER ("null": answer zeros), PEER_THREADS, PEER_BENCH (this folder). A model named jpeg takes encoded files, tensor floats.
"""
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy


class Handler:
    def initialize(self, context):
        sys.path.insert(0, os.environ["PEER_BENCH"])
        from peer_network import Network, prepare
        self.prepare = prepare
        self.jpeg = context.manifest["model"]["modelName"] == "jpeg"
        threads = int(os.environ["PEER_THREADS"])
        self.pool = ThreadPoolExecutor(threads)
        folder = os.environ["PEER_FOLDER"]
        self.network = None if folder == "null" else Network(folder, threads, range(1, 9))

    def handle(self, rows, context):
        bodies = [row["body"] for row in rows]
        if self.network is None:
            logits = numpy.zeros((len(bodies), 1000), numpy.float32)
        elif self.jpeg:
            logits = self.network.logits(numpy.stack(list(self.pool.map(lambda body: self.prepare(io.BytesIO(body)), bodies))))
        else:
            logits = self.network.logits(numpy.stack([numpy.frombuffer(body, numpy.float32).reshape(3, 224, 224) for body in bodies]))
        return numpy.argpartition(-logits, 5, axis=1)[:, :5].tolist()
