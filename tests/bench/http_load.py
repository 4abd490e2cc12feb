#!/usr/bin/env python3
"""`pyramid bench serve` for a server that speaks plain HTTP: the same loads and figures, as far as tests/bench/compare_serving needs them.

  http_load.py PORT PATH BODY_FILE [--form PART] (--rate R | --closed N) [--seconds S] [--warm-up S] [--deadline MS] [--within MS …]

One thread, HTTP/1.1 with kept connections. After its deadline a request's connection is closed.
"""
import argparse
import asyncio
import json
import random
import re
import resource
import socket


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("body")
    parser.add_argument("--form", help="send the body as a file in this part of a form")
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--closed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=1)
    parser.add_argument("--deadline", type=float, default=10_000)
    parser.add_argument("--within", type=float, nargs="*", default=[])
    args = parser.parse_args()
    with open(args.body, "rb") as file:
        body = file.read()
    kind = "application/octet-stream"
    if args.form:
        head = f'--part\r\nContent-Disposition: form-data; name="{args.form}"; filename="x"\r\nContent-Type: {kind}\r\n\r\n'
        body, kind = head.encode() + body + b"\r\n--part--\r\n", "multipart/form-data; boundary=part"
    request = f"POST {args.path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.05
    counted, end = start + args.warm_up, start + args.warm_up + args.seconds
    idle, latencies, delays, errors = [], [], [], {}

    async def exchange():
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", args.port, limit=1 << 20)
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
            await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        idle.append((reader, writer))
        return int(head.split(b" ", 2)[1])

    async def one(due):
        delay = loop.time() - due
        name = None
        try:
            status = await asyncio.wait_for(exchange(), max(0.001, args.deadline / 1000 - delay))
            name = None if status == 200 else f"HTTP {status}"
        except (asyncio.TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            name = type(error).__name__
        if counted <= due < end:
            delays.append(delay * 1000)
            if name is None:
                latencies.append((loop.time() - due) * 1000)
            else:
                errors[name] = errors.get(name, 0) + 1
        return name is None

    async def client():
        while loop.time() < end:
            if not await one(loop.time()):
                await asyncio.sleep(0.01)

    def alone():
        """One in flight, without an event loop's detours: they would count as the server's."""
        with socket.create_connection(("127.0.0.1", args.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while loop.time() < end:
                due = loop.time()
                connection.sendall(request)
                answer = connection.recv(65536)
                while b"\r\n\r\n" not in answer:
                    answer += connection.recv(65536)
                head, rest = answer.split(b"\r\n\r\n", 1)
                length = int(re.search(rb"content-length: *(\d+)", head, re.IGNORECASE).group(1))
                while len(rest) < length:
                    rest += connection.recv(65536)
                if due >= counted:
                    delays.append(0)
                    latencies.append((loop.time() - due) * 1000)

    if args.closed == 1:
        alone()
    elif args.closed:
        await asyncio.gather(*(client() for _ in range(args.closed)))
    else:
        times, tasks, due = random.Random(1), set(), start
        while True:
            due += times.expovariate(args.rate)
            if due >= end:
                break
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            task = loop.create_task(one(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    latencies.sort()

    def quantile(values, share):
        return values[min(len(values) - 1, max(0, -int(-share * len(values) // 1) - 1))] if values else None

    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({
        "due": len(delays), "answered": len(latencies), "answers_per_second": len(latencies) / args.seconds,
        "failed": sum(errors.values()), "errors": errors,
        "latency_ms": {"p50": quantile(latencies, 0.5), "p99": quantile(latencies, 0.99), "max": latencies[-1] if latencies else None,
                       "count": len(latencies)},
        "send_delay_ms": {"max": max(delays, default=0)},
        "goodput": [{"within_ms": bound, "per_second": sum(value <= bound for value in latencies) / args.seconds} for bound in args.within],
        "client_cpu_seconds": usage.ru_utime + usage.ru_stime,
    }))


asyncio.run(main())
