"""BentoML in front of OpenVINO in bf16: what tests/bench/compare_serving measures us against. POST /jpeg and /tensor, a file in the form's part
"files"; floats come as a file too, as its JSON would take twice as long. The answer is the five best classes.

Environment: PEER_FOLDER ("null": answer zeros), PEER_THREADS, PEER_LATENCY (max_latency_ms; its default is 60,000).
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bentoml
import numpy

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from peer_network import Network, prepare

BATCHED = {"batchable": True, "max_batch_size": 32, "max_latency_ms": int(os.environ.get("PEER_LATENCY", "60000"))}


@bentoml.service(workers=1, traffic={"timeout": 60})
class Peer:
    def __init__(self):
        threads = int(os.environ["PEER_THREADS"])
        self.pool = ThreadPoolExecutor(threads)
        folder = os.environ["PEER_FOLDER"]
        self.network = None if folder == "null" else Network(folder, threads, range(1, 9))

    def best(self, images):
        logits = numpy.zeros((len(images), 1000), numpy.float32) if self.network is None else self.network.logits(numpy.stack(images))
        return numpy.argpartition(-logits, 5, axis=1)[:, :5].tolist()

    @bentoml.api(**BATCHED)
    def jpeg(self, files: list[Path]) -> list[list[int]]:
        return self.best(list(self.pool.map(prepare, files)))

    @bentoml.api(**BATCHED)
    def tensor(self, files: list[Path]) -> list[list[int]]:
        return self.best([numpy.fromfile(file, numpy.float32).reshape(3, 224, 224) for file in files])
