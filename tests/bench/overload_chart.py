#!/usr/bin/env python3
"""Draws docs/overload.svg from the results of tests/bench/compare_serving --json: answers in time against offered load.

  tests/bench/overload_chart.py RESULTS.json [--within 100] [--out docs/overload.svg]
"""
import argparse
import json

COLORS = {"pyramid": "#0b6e4f", "triton": "#c05621", "triton tuned": "#dd8a2f", "torchserve": "#9c36b5", "bentoml": "#868e96",
          "bentoml 250": "#495057", "fastapi": "#3b5bdb"}
LEFT, TOP, WIDTH, HEIGHT = 70, 50, 520, 300


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--within", type=int, default=100)
    parser.add_argument("--out", default="docs/overload.svg")
    args = parser.parse_args()
    with open(args.results) as file:
        data = json.load(file)
    lines = {}
    for key, values in data["results"].items():
        name, *rest = key.split()
        if name == "goodput" and int(rest[1]) == args.within:
            for server, value in values.items():
                lines.setdefault(server, []).append((float(rest[0]), value["median"]))
    top = max(value for points in lines.values() for _, value in points) * 1.1
    right = max(load for points in lines.values() for load, _ in points)

    def x(load):
        return LEFT + WIDTH * load / right

    def y(value):
        return TOP + HEIGHT * (1 - value / top)

    def text(left, base, words, anchor="middle", extra=""):
        return f'<text x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}" {extra}>{words}</text>'

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 120} {TOP + HEIGHT + 60}" font-family="sans-serif" '
           'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
           text(LEFT, 24, f"{data['kind'].upper()} answers within {args.within} ms, per second, by offered load", "start", 'font-size="14"')]
    step = max(1, round(top / 5, -len(str(int(top / 5))) + 1))
    value = 0
    while value <= top:
        svg.append(f'<line x1="{LEFT}" y1="{y(value):.1f}" x2="{LEFT + WIDTH}" y2="{y(value):.1f}" stroke="#ddd"/>')
        svg.append(text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
        value += step
    for load in (0.5, 1, 2, 3, 4, 5):
        if load <= right:
            svg.append(text(x(load), TOP + HEIGHT + 18, f"{load:g}x"))
    svg.append(text(LEFT + WIDTH / 2, TOP + HEIGHT + 42, "offered load, in multiples of each server's own saturation"))
    for server, points in lines.items():
        points.sort()
        color = COLORS.get(server, "#555")
        path = " ".join(f"{x(load):.1f},{y(value):.1f}" for load, value in points)
        svg.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        svg.extend(f'<circle cx="{x(load):.1f}" cy="{y(value):.1f}" r="3.5" fill="{color}"/>' for load, value in points)
    ends = sorted((y(points[-1][1]), server) for server, points in lines.items())
    base = -100.0
    for at, server in ends:  # labels don't cover each other
        base = max(at + 4, base + 15)
        svg.append(text(LEFT + WIDTH + 10, base, server, "start", f'fill="{COLORS.get(server, "#555")}"'))
    svg.append("</svg>")
    with open(args.out, "w") as file:
        file.write("\n".join(svg) + "\n")


if __name__ == "__main__":
    main()
