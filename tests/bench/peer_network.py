"""OpenVINO in bf16 and Pillow, for the servers that tests/bench/compare_serving measures us against."""
import os

import numpy


def prepare(file):
    """timm's recipe: shorter side 248 bicubic, crop 224, normalised."""
    from PIL import Image
    image = Image.open(file).convert("RGB")
    width, height = image.size
    scale = 248 / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
    left, top = (image.size[0] - 224) // 2, (image.size[1] - 224) // 2
    pixels = numpy.asarray(image.crop((left, top, left + 224, top + 224)), numpy.float32) / 255
    pixels = (pixels - numpy.float32([0.485, 0.456, 0.406])) / numpy.float32([0.229, 0.224, 0.225])
    return numpy.ascontiguousarray(pixels.transpose(2, 0, 1))


class Network:
    """Networks of fixed batch sizes: with a dynamic one OpenVINO runs at 0.4 of that. Larger batches go in pieces."""

    def __init__(self, folder, threads, batches):
        import openvino
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.requests = {batch: core.compile_model(core.read_model(os.path.join(folder, f"pvt_v2_b0_{batch}_224.onnx")), "CPU",
                                                   settings).create_infer_request() for batch in batches}
        self.largest = max(batches)

    def logits(self, images):
        parts = []
        for start in range(0, len(images), self.largest):
            part = images[start:start + self.largest]
            request = self.requests[len(part)]
            request.infer([part])
            parts.append(request.get_output_tensor(0).data.copy())
        return parts[0] if len(parts) == 1 else numpy.concatenate(parts)
