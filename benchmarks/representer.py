"""Time until a small duality gap: ``python benchmarks/representer.py [--write]``.

One least-squares problem with an l^p penalty, 500 points and 2,000 features.  The peers are SciPy's L-BFGS-B on the
plain primal problem, for each exponent, and scikit-learn's KernelRidge, for p = 2.  All are timed in one process, in
turn, and what counts is the ratio.  L-BFGS-B does not know how far it has come: its iterates are compared, outside of
the clock, with the dual objective of our solution, which no primal value can be below.  With ``--write`` the numbers
are stored in results/benchmark-representer.json.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from scipy import optimize
from sklearn.kernel_ridge import KernelRidge

from kernelbook.files import write_whole
from kernelbook.representer import solve
from kernelbook.results import provenance

POINTS, FEATURES, ALPHA, ROUNDS = 500, 2000, 0.1, 3
EXPONENTS, GAPS = (1.5, 2.0, 3.0), (1e-4, 1e-6, 1e-10)
COMMAND = "python benchmarks/representer.py --write"


def data():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((POINTS, FEATURES)) / np.sqrt(FEATURES)
    v = np.where(np.arange(FEATURES) < 50, rng.standard_normal(FEATURES), 0)
    return A, np.sqrt(FEATURES / 50) * A @ v + 0.1 * rng.standard_normal(POINTS)


def lbfgs(A, y, p, bound):
    """Seconds until each relative gap to the bound is reached; None where it never is."""
    def both(v):
        residual, size = A @ v - y, np.abs(v)
        return (0.5 * (residual @ residual) + ALPHA / p * (size**p).sum(),
                A.T @ residual + ALPHA * np.sign(v) * size ** (p - 1))

    reached, clock = dict.fromkeys(GAPS), [time.perf_counter(), 0.0]

    def look(v):
        pause = time.perf_counter()
        gap = both(v)[0] / bound - 1
        for level in GAPS:
            if gap <= level and reached[level] is None:
                reached[level] = pause - clock[0] - clock[1]
        clock[1] += time.perf_counter() - pause

    result = optimize.minimize(both, np.zeros(FEATURES), jac=True, method="L-BFGS-B", callback=look,
                               options={"maxiter": 5000, "maxfun": 10_000, "ftol": 0, "gtol": 1e-12})
    return reached, result.fun / bound - 1, result.nit


def median(values):
    return None if any(v is None for v in values) else float(np.median(values))


def main(write: bool) -> None:
    about = provenance(command=COMMAND)
    A, y = data()
    rows = []
    for p in EXPONENTS:
        ours, theirs, ridge = [], [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            solution = solve(A, y, p=p, alpha=ALPHA)
            ours.append(time.perf_counter() - start)
            reached, final, steps = lbfgs(A, y, p, solution.dual_objective)
            theirs.append(reached)
            if p == 2:
                start = time.perf_counter()
                KernelRidge(alpha=ALPHA, kernel="precomputed").fit(A @ A.T, y)
                ridge.append(time.perf_counter() - start)
        own = median(ours)
        row = {"p": p, "relative_gap": solution.duality_gap / solution.objective, "iterations": solution.iterations,
               "seconds": own, "lbfgs_final_relative_gap": final, "lbfgs_iterations": steps,
               "lbfgs_over_ours": {f"{level:g}": None if (t := median([r[level] for r in theirs])) is None else t / own
                                   for level in GAPS},
               "kernel_ridge_over_ours": median(ridge) / own if ridge else None}
        rows.append(row)
        print(f"p = {p}: {own:.2f} s, {row['iterations']} systems, relative gap {row['relative_gap']:.1e}; "
              f"L-BFGS-B over ours, until each gap: {row['lbfgs_over_ours']}, ends at {final:.1e} after {steps} steps; "
              f"KernelRidge over ours: {row['kernel_ridge_over_ours']}")
    if write:
        path = Path(__file__).resolve().parent.parent / "results" / "benchmark-representer.json"
        record = {"name": "benchmark-representer", "points": POINTS, "features": FEATURES, "alpha": ALPHA,
                  "rounds": ROUNDS, "rows": rows, "provenance": about}
        write_whole(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
