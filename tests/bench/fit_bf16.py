#!/usr/bin/env python3
"""The tables and polynomials of the bf16 kernels (model/kernels/dwconv_gelu_fp16.cc, dwconv_gelu_bf16.cc, amx_attention.cc). Needs numpy.

  Table, fp16: gelu(x) = max(x, 0) - m (c0[i] + c1[i] m), where m = min(|x|, 3.875) and i = round(8 m): 32 lines through Q(m), the share
    that is missing. The last line is 0, so that large numbers come out exactly. Printed as fp16 bit patterns.
  Polynomial, f32: gelu(x) = x (1/2 + u p(u^2)), where u is x clamped to [-4, 4] and u p(u^2) is 1/2 at u = 4. Minimax by Lawson's method.
  2^f of attention: with 9 bits of fraction, 512 (2^f - 1 - f) + 48 for each eighth fraction, from f = 48 / 512 on.
"""
import math
import numpy as np


def q_erf(t):
    return math.erfc(t / math.sqrt(2)) / 2


def q_tanh(t):
    return 1 / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))


def line(q, i):
    """The fp16 pair with the least largest error of m Q(m) on the segment."""
    if i == 31:
        return np.float16(0), np.float16(0)
    m = np.linspace(max(0.0, i / 8 - 1 / 16), i / 8 + 1 / 16, 65)
    want = np.array([q(v) for v in m])
    slope = (want[-1] - want[0]) / (m[-1] - m[0])
    rest = want - slope * m
    best = (math.inf, None)
    for c1 in (np.float16(slope), np.nextafter(np.float16(slope), np.float16(0)), np.nextafter(np.float16(slope), np.float16(-1))):
        rest = want - float(c1) * m
        middle = np.float16((rest.max() + rest.min()) / 2)
        for c0 in (middle, np.nextafter(middle, np.float16(1)), np.nextafter(middle, np.float16(-1))):
            if i == 0:
                c0 = np.float16(0.5)  # gelu(x) = x / 2 around 0
            error = (np.abs(float(c0) + float(c1) * m - want) * np.maximum(m, 1 / 16)).max()
            if error < best[0]:
                best = (error, (c0, c1))
    return best[1]


def table(name, q):
    lines = [line(q, i) for i in range(32)]
    for part in (0, 1):
        print(f"{name} c{part}: " + ", ".join(f"0x{int(np.float16(c[part]).view(np.uint16)):04x}" for c in lines))


def polynomial(name, q, x_most=4.0, degree=7):
    u = x_most * np.cos(np.pi * (np.arange(4000) + 0.5) / 8000)
    want = np.array([(0.5 - q(v)) / v for v in u])
    # p(t) = (1/2) / X + (t - X^2) r(t)
    ends = 0.5 / x_most
    basis = np.polynomial.chebyshev.chebvander(2 * u**2 / x_most**2 - 1, degree - 1) * (u**2 - x_most**2)[:, None]
    weights, lawson, best = u * np.maximum(u, 0.25), np.ones(len(u)), (math.inf, None)
    for _ in range(300):
        scale = np.sqrt(lawson) * weights
        c = np.linalg.lstsq(basis * scale[:, None], (want - ends) * scale, rcond=None)[0]
        error = np.abs((basis @ c - (want - ends)) * weights)
        if error.max() < best[0]:
            best = (error.max(), c)
        lawson *= error / error.max() + 1e-3
        lawson /= lawson.max()
    r = np.polynomial.Polynomial(np.polynomial.chebyshev.cheb2poly(best[1]))(np.polynomial.Polynomial([-1, 2 / x_most**2]))
    p = r * np.polynomial.Polynomial([-x_most**2, 1]) + ends
    print(f"{name} polynomial, error of gelu {best[0]:.1e}: " + ", ".join(f"{np.float32(c):.9g}f" for c in p.coef))


for kind, share in (("erf", q_erf), ("tanh", q_tanh)):
    table(kind, share)
    polynomial(kind, share)

shifts = [min(0, round(float(np.mean([512 * (2 ** (f % 512 / 512) - 1) - f % 512 for f in range(8 * i + 48, 8 * i + 56)])))) + 48 for i in range(64)]
print("2^f: " + ", ".join(map(str, shifts)))
