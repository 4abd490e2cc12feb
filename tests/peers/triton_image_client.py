"""Triton's example image_client.py against our server: gRPC and HTTP, synchronous and asynchronous, batches of 1 and 3.

PYRAMID_TRITON_EXAMPLES=FOLDER is src/python/examples of a checkout of github.com/triton-inference-server/client: the program in it is run as
it is. PyPI doesn't have it; without the folder only its sequence of calls is made here, and the output says so."""
import os
import subprocess
import sys

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from PIL import Image

import pyramid
import server

PICTURES = ("scene.jpg", "exif_6.jpg", "gray.jpg")


def picture(name):
    return os.path.join(pyramid.GOLDEN, "images", name)


def expected_class(grpc_address, name):
    """Of the program's own preprocessing with -s INCEPTION, by a plain request for logits."""
    image = np.array(Image.open(picture(name)).convert("RGB").resize((224, 224), Image.BILINEAR)).astype(np.float32) / 127.5 - 1
    tensor = grpcclient.InferInput("image", [1, 3, 224, 224], "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[np.newaxis])
    with grpcclient.InferenceServerClient(grpc_address) as triton:
        result = triton.infer("pvt", [tensor], outputs=[grpcclient.InferRequestedOutput("logits")])
    return int(result.as_numpy("logits")[0].argmax())


def same_calls(name, client, address, expected):
    """What image_client.py asks and checks: one FP32 input of three dimensions in NCHW or NHWC, one FP32 vector, and three parts in a class's text."""
    with client.InferenceServerClient(address) as triton:
        metadata = triton.get_model_metadata("pvt", "")
        config = triton.get_model_config("pvt", "")
        if name == "grpc":
            config = config.config
            inputs, outputs, fixed = metadata.inputs, metadata.outputs, (config.max_batch_size, config.input[0].format, len(config.input))
            shape, datatype, output_type = list(inputs[0].shape), inputs[0].datatype, outputs[0].datatype
            input_name, output_name, output_shape = inputs[0].name, outputs[0].name, list(outputs[0].shape)
        else:
            inputs, outputs, fixed = metadata["inputs"], metadata["outputs"], (config["max_batch_size"], config["input"][0]["format"],
                                                                               len(config["input"]))
            shape, datatype, output_type = inputs[0]["shape"], inputs[0]["datatype"], outputs[0]["datatype"]
            input_name, output_name, output_shape = inputs[0]["name"], outputs[0]["name"], outputs[0]["shape"]
        good = (len(inputs) == 1 and len(outputs) == 1 and fixed[0] > 0 and fixed[1] in (2, "FORMAT_NCHW") and fixed[2] == 1 and len(shape) == 4 and
                datatype == "FP32" and output_type == "FP32" and sum(side > 1 for side in output_shape[1:]) == 1)
        pyramid.report(f"{name}: what it requires of a model", f"{shape} {datatype} {output_shape} {fixed[1]}", good)
        images = [np.array(Image.open(picture(file)).convert("RGB").resize((shape[3], shape[2]), Image.BILINEAR)) for file in PICTURES]
        batch = np.stack([(image.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1) for image in images])
        tensor = client.InferInput(input_name, batch.shape, datatype)
        tensor.set_data_from_numpy(batch)
        result = triton.infer("pvt", [tensor], request_id="1", model_version="", outputs=[client.InferRequestedOutput(output_name, class_count=2)])
        rows = result.as_numpy(output_name)
        found = [int("".join(chr(byte) for byte in row[0]).split(":")[1]) for row in rows]
        pyramid.report(f"{name}: classes", str(found), len(rows) == 3 and found == expected and
                       all(len("".join(chr(byte) for byte in text).split(":")) >= 3 for row in rows for text in row))


def themselves(program, grpc_address, http_address, expected):
    for name, address in (("grpc", grpc_address), ("HTTP", http_address)):
        for flags in ([], ["-a"], ["-b", "3"], ["-a", "-b", "3"]):
            command = [sys.executable, program, "-m", "pvt", "-u", address, "-i", name, "-s", "INCEPTION", "-c", "2", *flags]
            found, errors = [], ""
            for file in PICTURES:
                done = subprocess.run([*command, picture(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
                errors += done.stderr if done.returncode != 0 or "PASS" not in done.stdout else ""
                lines = [line for line in done.stdout.splitlines() if " = " in line]
                found.append(int(lines[0].split("(")[1].split(")")[0]) if lines else -1)
            pyramid.report(f"image_client.py -i {name} {' '.join(flags)}", f"{found}{' ' + errors[-300:] if errors else ''}",
                           found == expected and not errors)


def main():
    with server.running() as (grpc_address, http_address):
        expected = [expected_class(grpc_address, name) for name in PICTURES]
        same_calls("grpc", grpcclient, grpc_address, expected)
        same_calls("http", httpclient, http_address, expected)
        folder = os.environ.get("PYRAMID_TRITON_EXAMPLES")
        if folder:
            themselves(os.path.join(folder, "image_client.py"), grpc_address, http_address, expected)
        else:
            print("not run: image_client.py itself; PYRAMID_TRITON_EXAMPLES names the folder that has it")
    pyramid.finish()


main()
