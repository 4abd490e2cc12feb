"""Starts one of our servers with made-up weights in a temporary folder, puts it under load with `pyramid bench serve`, reads its figures."""
import json
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))


def cpu_seconds(pid):
    """User and system time of a process and its ended children."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return sum(int(fields[i]) for i in (11, 12)) / os.sysconf("SC_CLK_TCK")


def thread_seconds(pid):
    """The same by the threads' names."""
    seconds = {}
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/stat") as file:
                text = file.read()
        except OSError:  # it has ended
            continue
        name, fields = text[text.index("(") + 1:text.rindex(")")], text.rsplit(")", 1)[1].split()
        seconds[name] = seconds.get(name, 0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def receiving_seconds(size, seconds, rate=800, kept=128):
    """System time of receiving a message of `size` bytes over loopback, for a program that does nothing else: what the kernel takes to
    hand it over. Messages come at `rate` a second on two connections, and the last `kept` are kept, as a server under load keeps them."""
    listener = socket.create_server(("127.0.0.1", 0))
    sender = os.fork()
    if sender == 0:
        try:
            sockets = [socket.create_connection(listener.getsockname()) for _ in range(2)]
            message, number = os.urandom(size), 0
            while True:
                sockets[number % 2].sendall(message)
                number += 1
                time.sleep(1 / rate)
        finally:
            os._exit(0)  # the receiver has closed its end
    places = [memoryview(bytearray(b"1" * size)) for _ in range(kept)]
    waiting = select.epoll()
    half_read = {}
    for _ in range(2):
        connection = listener.accept()[0]
        waiting.register(connection, select.EPOLLIN)
        half_read[connection.fileno()] = [connection, None, 0]
    messages, begun, until = 0, resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.time() + seconds
    while time.time() < until:
        for number, _ in waiting.poll(1):
            state = half_read[number]
            if state[2] == 0:
                state[1] = places[messages % kept]
                messages += 1
            state[2] = (state[2] + state[0].recv_into(state[1][state[2]:])) % size
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_stime - begun
    for connection, _, _ in half_read.values():
        connection.close()
    listener.close()
    os.waitpid(sender, 0)
    return spent / messages


def memory_mb(pid):
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) / 1024


def on(apart, cores):
    return ["taskset", "-c", cores] if apart else []


class Served:
    """A server of ours; a context manager. `programs`: the folder with our programs. `program`: pyramid-server or null_server.
    `apart`: the server on the first core, its load on the others. `network_us`: what a picture takes in null_server."""

    def __init__(self, programs, program, variant="pvt_v2_b0", classes=1000, channels=3, dtype="bf16", config="", apart=False, network_us=0.0):
        self.apart = apart
        self.programs = programs
        self.folder = tempfile.TemporaryDirectory(prefix="pyramid-serving-")
        model = os.path.join(self.path("data"), "models", "net")
        os.makedirs(model)
        weights = self.path("weights.safetensors")
        self.quiet([self.program("formula_weights"), weights, variant, str(classes), str(channels)])
        self.quiet([self.program("pyramid"), "convert", weights, os.path.join(model, "1")])
        with open(os.path.join(model, "state.json"), "w") as file:
            json.dump({"format_version": 1, "name": "net", "aliases": {"stable": "1"}, "dtypes": {"1": dtype}}, file)
        with open(self.path("server.yaml"), "w") as file:
            file.write(config or "log_level: warning\n")
        self.log = open(self.path("log"), "w")
        self.process = subprocess.Popen(
            [*on(apart, "0"), self.program(program), "--data", self.path("data"), "--config", self.path("server.yaml"), "--grpc-port", "0", "--http-port",
             "0", "--metrics-port", "0"], stdout=self.log, stderr=self.log, env={**os.environ, "PYRAMID_NULL_US": str(network_us)})
        self.pid = self.process.pid
        self.address_file = os.path.join(self.path("data"), "server.json")
        until = time.time() + 60
        while not os.path.exists(self.address_file):
            if self.process.poll() is not None or time.time() > until:
                sys.exit(f"{program} didn't start:\n{open(self.path('log')).read()}")
            time.sleep(0.05)
        self.addresses = json.load(open(self.address_file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self.log.close()
        self.folder.cleanup()

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def program(self, name):
        return os.path.join(self.programs, name)

    def quiet(self, command):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stdout}")

    def load(self, *options):
        """`pyramid bench serve OPTIONS`: its object, with the server's CPU seconds and its counters' growth."""
        return load(self.programs, self.addresses["grpc"], options, self)

    def write_picture(self):
        """A JPEG of 500x375 and 60,442 bytes, as the notes on the rivals have one; its path."""
        path = self.path("scene.jpg")
        self.quiet([self.program("preprocess_bench"), "--quality", "66", "--write", path])
        return path

    def metrics(self):
        """Every series without its labels, summed: enough for a server with one model."""
        sums = {}
        text = urllib.request.urlopen(f"http://{self.addresses['metrics']}/metrics").read().decode()
        for line in text.splitlines():
            if line and line[0] != "#":
                name, value = line.rsplit(" ", 1)
                for key in {name, name.split("{")[0]}:
                    sums[key] = sums.get(key, 0) + float(value)
        return sums


def load(programs, address, options, server=None):
    before = server.metrics() if server else {}
    cpu = cpu_seconds(server.pid) if server else 0
    command = [*on(server and server.apart, f"1-{os.cpu_count() - 1}"), os.path.join(programs, "pyramid"), "bench", "serve", "--server", address, "--json", *[str(option) for option in options]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if not lines:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr}")
    result = json.loads(lines[-1])
    if server:
        result["server_cpu_seconds"] = cpu_seconds(server.pid) - cpu
        after = server.metrics()
        result["grown"] = {key: value - before.get(key, 0) for key, value in after.items()}
    return result


def within(result, index=0):
    """Answers a second in the time given with --within."""
    return result["goodput"][index]["per_second"] if result["goodput"] else 0
