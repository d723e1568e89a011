"""From which length on the linear path is faster than the others: ``python benchmarks/crossover.py``.

For each kind of features and each width it doubles the length until the linear path beats the best of the others, and
prints that length (between two tries, interpolated), also as a multiple of the number of features.  Times are minima
over interleaved repetitions on one thread, forward with backward; ``kernelbook.attention.linear.crossover`` has the
factors that came out.

``python benchmarks/crossover.py --widths 16 64 --kernels elu quadratic --causal`` measures some only.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from kernelbook import kernels
from kernelbook.attention import PATHS
from kernelbook.attention.call import Call

KERNELS = {
    "elu": kernels.get("elu"),
    "l2_squared": kernels.get("l2_squared"),
    "positive_features": kernels.get("positive_features"),
    "fourier_features": kernels.get("fourier_features"),
    "quadratic": kernels.get("quadratic"),
    "taylor": kernels.get("taylor"),
}


def seconds(path: str, n: int, d: int, kernel: kernels.Kernel, causal: bool, backward: bool) -> float:
    """The time of one call."""
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(1, 2, n, d, generator=generator).requires_grad_(backward) for _ in range(3))
    start = time.perf_counter()
    out = PATHS[path].compute(q, k, v, kernel, mask=None, causal=causal, dropout=0.0,
                              normaliser="sum" if kernel.normalisable else "none")
    if backward:
        out.backward(torch.ones_like(out))
    return time.perf_counter() - start


def gain(n: int, d: int, kernel: kernels.Kernel, causal: bool, backward: bool) -> float:
    """How many times as long the best of the other paths takes."""
    call = Call(kernel, "sum" if kernel.normalisable else "none", n=n, m=n, d=d, d_v=d, batch=2, causal=causal,
                gradient=backward)
    paths = [name for name, path in PATHS.items() if path.refusal(call) is None]
    best = dict.fromkeys(paths, math.inf)
    for _ in range(4):
        for path in paths:
            best[path] = min(best[path], seconds(path, n, d, kernel, causal, backward))
    linear = best.pop("linear")
    return min(best.values()) / linear


def crossover(d: int, kernel: kernels.Kernel, causal: bool, backward: bool) -> float:
    """The length at which the linear path draws level, or infinity if it does not up to 8,192."""
    n, before = 16, 0.0
    while n <= 8192:
        now = gain(n, d, kernel, causal, backward)
        if now >= 1:
            return n if before == 0 else n / 2 ** (math.log(now) / math.log(now / before))
        n, before = 2 * n, now
    return math.inf


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--forward", action="store_true", help="without the backward pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print("causal" if options.causal else "full", "forward" if options.forward else "forward and backward")
    for name in options.kernels:
        for d in options.widths:
            rank, length = KERNELS[name].feature_dimension(d), crossover(d, KERNELS[name], options.causal,
                                                                         not options.forward)
            print(f"{name:18} d = {d:3}  {rank:5} features  crossover {length:6.0f} = {length / rank:.2f} x",
                  flush=True)


if __name__ == "__main__":
    main()
