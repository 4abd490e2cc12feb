"""Triton's Python clients, unchanged, against our server: gRPC and HTTP, synchronous, by callback and asyncio, floats and files, raw and
typed, classification, metadata, statistics, the repository, errors. The logits are the golden ones."""
import asyncio
import os
import queue
import subprocess
import sys

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpaio
from tritonclient.utils import InferenceServerException

import pyramid
import server

CLASSES = 1000
LIMIT = 3e-5  # of the packed path, from the golden logits


def golden():
    case = next(case for case in pyramid.golden("logits_torch.json") if case["variant"] == "pvt_v2_b0" and case["height"] == 224)
    return server.pictures(case["batch"], 224, 224), np.array(case["logits"])


def files(*names):
    return [open(os.path.join(pyramid.GOLDEN, "images", name), "rb").read() for name in names]


def float_input(client, pictures):
    tensor = client.InferInput("image", list(pictures.shape), "FP32")
    tensor.set_data_from_numpy(pictures)
    return [tensor]


def file_input(client, contents):
    tensor = client.InferInput("image", [len(contents), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(contents, dtype=np.object_).reshape(len(contents), 1))
    return [tensor]


def logits_of(result):
    return result.as_numpy("logits")


def raises(what, statuses, call):
    """The call must fail with a status that has this text, or one of these."""
    try:
        call()
    except InferenceServerException as error:
        pyramid.report(what, f"{error.status()}: {str(error.message())[:90]}",
                       any(status in str(error.status()) for status in ([statuses] if isinstance(statuses, str) else statuses)))
    else:
        pyramid.report(what, "no error", False)


def synchronous(name, client, address):
    pictures, expected = golden()
    with client.InferenceServerClient(address) as triton:
        pyramid.report(f"{name}: live, ready, model ready",
                       f"{triton.is_server_live()} {triton.is_server_ready()} {triton.is_model_ready('pvt')} {triton.is_model_ready('nosuch')}",
                       triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("pvt") and
                       triton.is_model_ready("pvt", "1") and not triton.is_model_ready("nosuch"))
        outputs = [client.InferRequestedOutput("logits"), client.InferRequestedOutput("probabilities")]
        result = triton.infer("pvt", float_input(client, pictures), outputs=outputs, request_id="42", priority=1, timeout=20_000_000)
        pyramid.compare(f"{name}: logits", expected, logits_of(result), LIMIT)
        shares = np.exp(expected - expected.max(axis=1, keepdims=True))
        pyramid.compare(f"{name}: probabilities", shares / shares.sum(axis=1, keepdims=True), result.as_numpy("probabilities"), 1e-6)
        response = result.get_response()
        echoed = response["id"] if isinstance(response, dict) else response.id
        pyramid.report(f"{name}: the id comes back", echoed, echoed == "42")

        default = triton.infer("pvt", float_input(client, pictures))
        pyramid.report(f"{name}: no outputs asked for", str(default.as_numpy("probabilities").shape),
                       default.as_numpy("probabilities").shape == (2, CLASSES))

        classes = triton.infer("pvt", float_input(client, pictures), outputs=[client.InferRequestedOutput("logits", class_count=3)])
        texts = classes.as_numpy("logits")
        parts = [text.decode().split(":", 2) for text in texts[0]]
        pyramid.report(f"{name}: classification", " | ".join(texts[0][i].decode() for i in range(3)),
                       texts.shape == (2, 3) and [int(part[1]) for part in parts] == list(np.argsort(-expected[0])[:3]) and
                       all(part[2] for part in parts))

        native = server.native_logits(files("scene.jpg", "exif_6.jpg"))
        result = triton.infer("pvt", file_input(client, files("scene.jpg", "exif_6.jpg")), outputs=[client.InferRequestedOutput("logits")])
        pyramid.compare(f"{name}: files, against `pyramid classify`", native, logits_of(result), 1e-4)

        raises(f"{name}: unknown model", "404" if name == "http" else "NOT_FOUND", lambda: triton.infer("nosuch", float_input(client, pictures)))
        raises(f"{name}: unknown version", "404" if name == "http" else "NOT_FOUND",
               lambda: triton.infer("pvt", float_input(client, pictures), model_version="9"))
        raises(f"{name}: not a picture", "400" if name == "http" else "INVALID_ARGUMENT", lambda: triton.infer("pvt", file_input(client, [b"text"])))
        raises(f"{name}: another datatype", "400" if name == "http" else "INVALID_ARGUMENT", lambda: triton.infer("pvt", wrong_type(client)))
        # It has passed when it is looked at, or is sure to.
        raises(f"{name}: a deadline that passes", ("504", "429") if name == "http" else ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"),
               lambda: triton.infer("pvt", float_input(client, pictures), timeout=1))


def wrong_type(client):
    tensor = client.InferInput("image", [1, 3, 224, 224], "UINT8")
    tensor.set_data_from_numpy(np.zeros([1, 3, 224, 224], dtype=np.uint8))
    return [tensor]


def descriptions(grpc_address, http_address):
    with grpcclient.InferenceServerClient(grpc_address) as triton:
        extensions = list(triton.get_server_metadata().extensions)
        metadata = triton.get_model_metadata("pvt")
        config = triton.get_model_config("pvt").config
        statistics = triton.get_inference_statistics("pvt").model_stats[0]
        index = triton.get_model_repository_index().models
        pyramid.report("grpc: metadata and configuration", f"{list(metadata.inputs[0].shape)} {list(config.input[0].dims)} {config.max_batch_size}",
                       list(metadata.inputs[0].shape) == [-1, 3, 224, 224] and list(config.input[0].dims) == [3, 224, 224] and
                       config.max_batch_size > 0 and config.input[0].format == 2)
        pyramid.report("grpc: statistics", f"version {statistics.version}, {statistics.inference_count} pictures",
                       "statistics" in extensions and int(statistics.version) == 1 and statistics.inference_stats.success.count > 0)
        pyramid.report("grpc: index", f"{index[0].name} {index[0].version} {index[0].state}", index[0].state == "READY")
        triton.unload_model("pvt")
        gone = triton.is_model_ready("pvt")
        triton.load_model("pvt")
        pyramid.report("grpc: unload and load", f"{gone} {triton.is_model_ready('pvt')}", not gone and triton.is_model_ready("pvt"))
        raises("grpc: a configuration of the caller's", "INVALID_ARGUMENT", lambda: triton.load_model("pvt", config="{}"))
        raises("grpc: shared memory isn't there", "UNIMPLEMENTED", lambda: triton.get_system_shared_memory_status())
    with httpclient.InferenceServerClient(http_address) as triton:
        metadata = triton.get_model_metadata("pvt")
        config = triton.get_model_config("pvt", "1")
        statistics = triton.get_inference_statistics("pvt")["model_stats"][0]
        index = triton.get_model_repository_index()
        pyramid.report("http: metadata and configuration", f"{metadata['inputs'][0]['shape']} {config['input'][0]['format']}",
                       metadata["inputs"][0]["shape"] == [-1, 3, 224, 224] and config["input"][0]["format"] == "FORMAT_NCHW" and
                       config["max_batch_size"] > 0)
        pyramid.report("http: statistics", f"version {statistics['version']}, {statistics['inference_stats']['success']['count']} requests",
                       statistics["version"] == "1" and isinstance(statistics["inference_stats"]["success"]["ns"], int))
        pyramid.report("http: index", str(index[0]), index[0]["state"] == "READY")
        triton.unload_model("pvt")
        gone = triton.is_model_ready("pvt")
        triton.load_model("pvt")
        pyramid.report("http: unload and load", f"{gone} {triton.is_model_ready('pvt')}", not gone and triton.is_model_ready("pvt"))


def by_callback(grpc_address, http_address):
    """async_infer: gRPC calls back, HTTP gives something to wait for."""
    pictures, expected = golden()
    answers = queue.Queue()
    with grpcclient.InferenceServerClient(grpc_address) as triton:
        for i in range(20):
            triton.async_infer("pvt", float_input(grpcclient, pictures[i % 2:i % 2 + 1]), lambda result, error: answers.put((result, error)),
                               request_id=str(i), outputs=[grpcclient.InferRequestedOutput("logits")])
        found = {}
        for _ in range(20):
            result, error = answers.get(timeout=60)
            if error is None:
                found[result.get_response().id] = logits_of(result)[0]
        everything = np.array([found[str(i)] for i in range(20)]) if len(found) == 20 else np.zeros([0])
        pyramid.compare("grpc: 20 by callback", np.array([expected[i % 2] for i in range(20)]), everything, LIMIT)
    with httpclient.InferenceServerClient(http_address, concurrency=8) as triton:
        waiting = [triton.async_infer("pvt", float_input(httpclient, pictures[i % 2:i % 2 + 1]), outputs=[httpclient.InferRequestedOutput("logits")])
                   for i in range(20)]
        everything = np.array([logits_of(handle.get_result())[0] for handle in waiting])
        pyramid.compare("http: 20 at once", np.array([expected[i % 2] for i in range(20)]), everything, LIMIT)


async def asynchronous(name, client, protocol, address):
    pictures, expected = golden()
    async with client.InferenceServerClient(address) as triton:
        calls = [triton.infer("pvt", float_input(protocol, pictures[i % 2:i % 2 + 1]), outputs=[protocol.InferRequestedOutput("logits")])
                 for i in range(20)]
        everything = np.array([logits_of(result)[0] for result in await asyncio.gather(*calls)])
        pyramid.compare(f"{name}: 20 by asyncio", np.array([expected[i % 2] for i in range(20)]), everything, LIMIT)
        metadata = await triton.get_model_metadata("pvt")
        found = metadata["name"] if isinstance(metadata, dict) else metadata.name
        pyramid.report(f"{name}: metadata by asyncio", found, found == "pvt")


def typed_contents(grpc_address):
    """Not through InferInput, which is always raw: the generated stub."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc
    pictures, expected = golden()
    request = service_pb2.ModelInferRequest(model_name="pvt", id="typed")
    tensor = request.inputs.add(name="image", datatype="FP32", shape=pictures.shape)
    tensor.contents.fp32_contents.extend(pictures.ravel().tolist())
    request.outputs.add(name="logits")
    with grpc.insecure_channel(grpc_address) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    found = np.frombuffer(answer.raw_output_contents[0], dtype=np.float32).reshape(list(answer.outputs[0].shape))
    pyramid.compare("grpc: typed contents in, raw out", expected, found, LIMIT)


def http_variants(http_address):
    pictures, expected = golden()
    with httpclient.InferenceServerClient(http_address) as triton:
        tensor = httpclient.InferInput("image", list(pictures.shape), "FP32")
        tensor.set_data_from_numpy(pictures, binary_data=False)
        result = triton.infer("pvt", [tensor], outputs=[httpclient.InferRequestedOutput("logits", binary_data=False)])
        pyramid.compare("http: JSON in, JSON out", expected, logits_of(result), LIMIT)
        for algorithm in ("gzip", "deflate"):
            result = triton.infer("pvt", float_input(httpclient, pictures), outputs=[httpclient.InferRequestedOutput("logits")],
                                  request_compression_algorithm=algorithm, response_compression_algorithm=algorithm)
            pyramid.compare(f"http: {algorithm}", expected, logits_of(result), LIMIT)


def guarded():
    """The clients' own flags for TLS and headers for a key."""
    pictures, expected = golden()
    certificate, private_key, keys = pyramid.path("server.pem"), pyramid.path("server.key"), pyramid.path("keys.yaml")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=IP:127.0.0.1", "-keyout", private_key, "-out", certificate], check=True, stderr=subprocess.DEVNULL)
    made = subprocess.run([pyramid.PROGRAM, "key", "new", "phones", "--scopes", "infer"], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True)
    with open(keys, "w") as file:
        file.write(made.stderr.strip().splitlines()[-1] + "\n")
    headers = {"authorization": f"Bearer {made.stdout.strip()}"}
    with server.running("--tls-cert", certificate, "--tls-key", private_key, "--keys", keys) as (grpc_address, http_address):
        for name, client, options in (("grpc", grpcclient, {"url": grpc_address, "root_certificates": certificate}),
                                      ("http", httpclient, {"url": http_address, "ssl_options": {"ca_certs": certificate}})):
            with client.InferenceServerClient(ssl=True, **options) as triton:
                result = triton.infer("pvt", float_input(client, pictures), outputs=[client.InferRequestedOutput("logits")], headers=headers)
                pyramid.compare(f"{name}: over TLS with a key", expected, logits_of(result), LIMIT)
                pyramid.report(f"{name}: health needs no key", str(triton.is_server_ready()), triton.is_server_ready())
                raises(f"{name}: without a key", "401" if name == "http" else "UNAUTHENTICATED",
                       lambda: triton.infer("pvt", float_input(client, pictures)))
                raises(f"{name}: a key of another scope", "403" if name == "http" else "PERMISSION_DENIED",
                       lambda: triton.unload_model("pvt", headers=headers))


def main():
    with server.running() as (grpc_address, http_address):
        synchronous("grpc", grpcclient, grpc_address)
        synchronous("http", httpclient, http_address)
        typed_contents(grpc_address)
        http_variants(http_address)
        by_callback(grpc_address, http_address)
        asyncio.run(asynchronous("grpc", grpcaio, grpcclient, grpc_address))
        asyncio.run(asynchronous("http", httpaio, httpclient, http_address))
        descriptions(grpc_address, http_address)
    guarded()
    pyramid.finish()


if __name__ == "__main__":
    sys.exit(main())
