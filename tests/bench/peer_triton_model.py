"""Triton's Python backend in front of OpenVINO in bf16: the model.py that tests/bench/compare_serving puts into Triton's repository.

Parameters of the model: folder ("null": answer zeros), threads, input ("jpeg": encoded files; "tensor").
"""
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        parameters = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        sys.path.insert(0, parameters["bench"])
        from peer_network import Network, prepare
        self.prepare = prepare
        self.jpeg = parameters["input"] == "jpeg"
        threads = int(parameters["threads"])
        self.pool = ThreadPoolExecutor(threads)
        self.network = None if parameters["folder"] == "null" else Network(parameters["folder"], threads, range(1, 9))

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        counts = [len(one) for one in inputs]
        if self.network is None:
            logits = numpy.zeros((sum(counts), 1000), numpy.float32)
        else:
            if self.jpeg:
                files = [bytes(row[0]) for one in inputs for row in one]
                images = numpy.stack(list(self.pool.map(lambda file: self.prepare(io.BytesIO(file)), files)))
            else:
                images = inputs[0] if len(inputs) == 1 else numpy.concatenate(inputs)
            logits = self.network.logits(images)
        best = numpy.argpartition(-logits, 5, axis=1)[:, :5].astype(numpy.int32)
        answers, start = [], 0
        for count in counts:
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("best", best[start:start + count])]))
            start += count
        return answers
