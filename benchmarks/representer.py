"""Time until a small duality gap: ``python benchmarks/representer.py [--write]``.

Least squares with an l^p penalty on 500 points: once with 2,000 random features, all of one size, which is easy for
any method, and once with the 1,771 monomial features up to degree 20 of points in [-1, 1]^3, of very different sizes.
The peers are SciPy's L-BFGS-B on the plain primal problem, for each exponent, and scikit-learn's KernelRidge, for
p = 2.  All are timed in one process, in turn, and what counts is the ratio.  L-BFGS-B does not know how far it has
come: its iterates are compared, outside of the clock, with the dual objective of our solution, which no primal value
can be below.  With ``--write`` the numbers are stored in results/benchmark-representer.json.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy import optimize
from sklearn.kernel_ridge import KernelRidge

from kernelbook.features import MultinomialFeatures
from kernelbook.files import write_whole
from kernelbook.representer import solve
from kernelbook.results import provenance

POINTS, ROUNDS = 500, 3
EXPONENTS, GAPS = (1.5, 2.0, 3.0), (1e-4, 1e-6, 1e-10)
COMMAND = "python benchmarks/representer.py --write"


def problems():
    """Name, features, targets and alpha of each."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((POINTS, 2000)) / np.sqrt(2000)
    y = 5 * A[:, :50] @ rng.standard_normal(50) + 0.1 * rng.standard_normal(POINTS)
    yield "random", A, y, 0.1
    x = rng.uniform(-1, 1, (POINTS, 3))
    y = np.sin(3 * x[:, 0]) * x[:, 1] + np.abs(x[:, 2]) + 0.1 * rng.standard_normal(POINTS)
    yield "monomial", MultinomialFeatures(20)(torch.from_numpy(x)).numpy(), y, 0.01


def lbfgs(A, y, p, alpha, bound):
    """Seconds until each relative gap to the bound is reached; None where it never is."""
    def both(v):
        residual, size = A @ v - y, np.abs(v)
        return (0.5 * (residual @ residual) + alpha / p * (size**p).sum(),
                A.T @ residual + alpha * np.sign(v) * size ** (p - 1))

    reached, clock = dict.fromkeys(GAPS), [time.perf_counter(), 0.0]

    def look(v):
        pause = time.perf_counter()
        gap = both(v)[0] / bound - 1
        for level in GAPS:
            if gap <= level and reached[level] is None:
                reached[level] = pause - clock[0] - clock[1]
        clock[1] += time.perf_counter() - pause

    result = optimize.minimize(both, np.zeros(A.shape[1]), jac=True, method="L-BFGS-B", callback=look,
                               options={"maxiter": 5000, "maxfun": 10_000, "ftol": 0, "gtol": 1e-12})
    return reached, result.fun / bound - 1, result.nit


def median(values):
    return None if any(v is None for v in values) else float(np.median(values))


def main(write: bool) -> None:
    about = provenance(command=COMMAND)
    rows = []
    for name, A, y, alpha in problems():
        for p in EXPONENTS:
            ours, theirs, ridge = [], [], []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                solution = solve(A, y, p=p, alpha=alpha)
                ours.append(time.perf_counter() - start)
                reached, final, steps = lbfgs(A, y, p, alpha, solution.dual_objective)
                theirs.append(reached)
                if p == 2:
                    start = time.perf_counter()
                    KernelRidge(alpha=alpha, kernel="precomputed").fit(A @ A.T, y)
                    ridge.append(time.perf_counter() - start)
            own, others = median(ours), {level: median([r[level] for r in theirs]) for level in GAPS}
            row = {"features": name, "shape": list(A.shape), "alpha": alpha, "p": p, "seconds": own,
                   "iterations": solution.iterations, "relative_gap": solution.duality_gap / solution.objective,
                   "lbfgs_over_ours": {f"{k:g}": None if t is None else t / own for k, t in others.items()},
                   "lbfgs_iterations": steps, "lbfgs_final_relative_gap": final,
                   "kernel_ridge_over_ours": median(ridge) / own if ridge else None}
            rows.append(row)
            ratios = ", ".join(f"{k}: {t:.2f}" if t else f"{k}: never" for k, t in row["lbfgs_over_ours"].items())
            print(f"{name}, p = {p}: {own:.2f} s, {solution.iterations} systems, gap {row['relative_gap']:.0e}")
            print(f"  L-BFGS-B over ours, until the gap is {ratios} (it ends at {final:.0e} after {steps} steps)")
            if ridge:
                print(f"  KernelRidge over ours: {row['kernel_ridge_over_ours']:.2f}")
    if write:
        path = Path(__file__).resolve().parent.parent / "results" / "benchmark-representer.json"
        about["versions"] |= {name: version(name) for name in ("numpy", "scipy", "scikit-learn")}
        record = {"kind": "benchmark", "name": path.stem, "rounds": ROUNDS, "rows": rows, "provenance": about}
        write_whole(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
