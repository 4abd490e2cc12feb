#!/usr/bin/env python3
"""The polynomials of model/kernels/f32_kernels.inc: minimax fits by Lawson's method (least squares whose weights grow where the error is
largest), printed as f32. Needs numpy.

  log2 of Q on [0, 6], where gelu(x) = max(x, 0) - |x| Q(|x|):
    erf    Q(t) = erfc(t / sqrt 2) / 2, degree 8
    tanh   Q(t) = 1 / (1 + exp(2 sqrt(2 / pi) (t + 0.044715 t^3))), degree 10
  An error of e in log2 Q is one of ln 2 Q e in gelu(x) / x: that is the weight, and a little more for the far end.
  2^f on [-1/2, 1/2], degree 5, relative error.
"""
import math
import numpy as np


def fit(y, low, high, degree, weight, points=4000, rounds=300):
    u = np.cos(np.pi * (np.arange(points) + 0.5) / points)
    x = (low + high) / 2 + (high - low) / 2 * u
    values = np.array([y(v) for v in x])
    weights = np.array([weight(v) for v in x])
    basis = np.polynomial.chebyshev.chebvander(u, degree)
    lawson = np.ones(points)
    best = (math.inf, None)
    for _ in range(rounds):
        scale = np.sqrt(lawson) * weights
        c = np.linalg.lstsq(basis * scale[:, None], values * scale, rcond=None)[0]
        error = np.abs((basis @ c - values) * weights)
        if error.max() < best[0]:
            best = (error.max(), c)
        lawson *= error / error.max() + 1e-3
        lawson /= lawson.max()
    inner = np.polynomial.Polynomial([-(low + high) / (high - low), 2 / (high - low)])
    return best[0], np.polynomial.Polynomial(np.polynomial.chebyshev.cheb2poly(best[1]))(inner).coef


def show(name, result):
    print(f"{name}  weighted error {result[0]:.1e}, constant first")
    print("  " + ", ".join(f"{np.float32(c):.9g}f" for c in result[1]))


def q_erf(t):
    return math.erfc(t / math.sqrt(2)) / 2


def q_tanh(t):
    return 1 / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))


for name, q, degree, far in (("erf", q_erf, 8, 1e-5), ("tanh", q_tanh, 10, 1e-6)):
    show(name, fit(lambda t: math.log2(q(t)), 0, 6, degree, lambda t: math.log(2) * (q(t) + far)))
show("2^f", fit(lambda f: 2**f, -0.5, 0.5, 5, lambda f: 2**-f))
