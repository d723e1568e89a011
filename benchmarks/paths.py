"""Time until a small gradient of the action of attention paths: ``python benchmarks/paths.py [--write]``.

The peer is what one would write first: Adam on the order parameters themselves, symmetrised, from the limit of infinite
width, on the same action divided by the largest width, with gradients by autograd; step 0.1, and 5,000 steps at most.
How far each has come is measured in one way for both, outside of the clock, by the norm of the gradient in the solver's
coordinates (Adam is looked at after every ten steps).  Both are timed in one process, in turn, on one thread, and what
counts is the ratio.  Times are of the solve; kernels between paths are given.

The tasks are hidden Markov chains: the one with four paths, at P = 100, and one with 16 paths, at P = 300.  A process
of its own measures the peak memory of kernels and solve at P = 600 and 16 paths.  With ``--write`` the numbers are
stored in results/benchmark-paths.json.
"""

import json
import multiprocessing
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from kernelbook.files import write_whole
from kernelbook.paths import Architecture, action, path_inputs, path_kernels, solve_order_parameters, theory
from kernelbook.paths.hidden_markov import HiddenMarkov, four_paths, random_head, staying_head, uniform_head
from kernelbook.paths.network import bilinear_attention
from kernelbook.results import provenance

LEVELS = (1e-2, 1e-4, 1e-6)             # of the norm of the gradient
WIDTHS, ROUNDS, STEPS = (10, 100, 1000), 3, 5_000
COMMAND = "python benchmarks/paths.py --write"


def sixteen_paths(examples):
    """Kernels between paths and labels of chains seen by one good head, one uniform and six random ones."""
    chain, generator = HiddenMarkov(), torch.Generator().manual_seed(0)
    x, y, _ = chain.sample(examples, generator)
    layers = [torch.stack([head(chain), *(random_head(chain, generator) for _ in range(3))])
              for head in (staying_head, uniform_head)]
    return path_kernels(path_inputs(x, [bilinear_attention(x, 10 * forms) for forms in layers], chain.readout)), y


def problems(sizes):
    """Name, heads, kernels, labels and temperature of each."""
    task = four_paths(sizes[0], seed=0)
    yield "four paths", (2, 2), path_kernels(path_inputs(task.inputs, task.attention, task.readout)), task.labels, 0.01
    yield "16 paths", (4, 4), *sixteen_paths(sizes[1]), 0.01


def adam(kernels, labels, steps, **problem):
    """Seconds until each level, None where it never is reached; the steps taken, and the last norm."""
    sizes = Architecture(problem["heads"], problem["widths"], problem["variances"])
    energy, coordinates = theory._Energy(kernels, labels, problem["temperature"]), theory._Coordinates(sizes)

    def norm():
        triangles = coordinates.inverse([(u + u.mT) / 2 for u in U], "U")
        roots, lefts = coordinates.roots(triangles)
        return float(np.linalg.norm(coordinates.gradient(triangles, roots, lefts, energy(roots[0] @ roots[0].T)[1])))

    U = [torch.eye(d, dtype=torch.float64, requires_grad=True) for d in sizes.sizes]
    optimizer = torch.optim.Adam(U, lr=0.1)
    reached, now, seconds, step = dict.fromkeys(LEVELS), norm(), 0.0, 0
    while step < steps and now > min(LEVELS):
        start = time.perf_counter()
        try:
            for _ in range(10):
                optimizer.zero_grad()
                (action([(u + u.mT) / 2 for u in U], kernels, labels, **problem) / max(sizes.widths)).backward()
                optimizer.step()
            seconds, step, now = seconds + time.perf_counter() - start, step + 10, norm()
        except ValueError:              # nothing keeps the matrices positive definite
            return reached, step, float("nan")
        for level in LEVELS:
            if now <= level and reached[level] is None:
                reached[level] = seconds
    return reached, step, now


def median(values):
    return None if any(v is None for v in values) else float(np.median(values))


def compare(name, heads, kernels, labels, temperature, width, rounds=ROUNDS, steps=STEPS):
    """One row: our seconds for each level, and Adam's over ours."""
    problem = {"heads": heads, "widths": (width,) * 3, "variances": (1.0,) * 4, "temperature": temperature}
    ours, theirs = {level: [] for level in LEVELS}, []
    for _ in range(rounds):
        for level in LEVELS:
            start = time.perf_counter()
            solution = solve_order_parameters(kernels, labels, tol=level, **problem)
            ours[level].append(time.perf_counter() - start)
        reached, taken, last = adam(kernels, labels, steps, **problem)
        theirs.append(reached)
    seconds = {level: median(values) for level, values in ours.items()}
    others = {level: median([row[level] for row in theirs]) for level in LEVELS}
    return {"task": name, "examples": len(labels), "paths": len(kernels), "width": width, "temperature": temperature,
            "seconds": {f"{level:g}": t for level, t in seconds.items()},
            "evaluations": solution.evaluations, "starts": sum(len(m.starts) for m in solution.minima),
            "gradient_norm": solution.gradient_norm,
            "adam_over_ours": {f"{level:g}": t and t / seconds[level] for level, t in others.items()},
            "adam_steps": taken, "adam_last_gradient_norm": last}


def _memory(examples, connection):
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernels, y = sixteen_paths(examples)
    solution = solve_order_parameters(kernels, y, heads=(4, 4), widths=(10, 10, 10), variances=(1.0,) * 4,
                                      temperature=0.01)
    unit = 1 if sys.platform == "darwin" else 1024              # bytes there, kibibytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send({"examples": examples, "paths": 16, "converged": solution.converged, "peak_bytes": peak * unit,
                     "before_bytes": before * unit, "kernels_bytes": kernels.nbytes})


def memory(examples):
    """The peak memory of one process that computes the kernels and solves."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_memory, args=(examples, sender))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def main(write, sizes=(100, 300, 600), widths=WIDTHS, rounds=ROUNDS, steps=STEPS):
    torch.set_num_threads(1)
    about, rows = provenance(command=COMMAND), []
    for name, heads, kernels, labels, temperature in problems(sizes):
        compare(name, heads, kernels, labels, temperature, widths[0], rounds=1, steps=10)      # to warm up
        for width in widths:
            row = compare(name, heads, kernels, labels, temperature, width, rounds, steps)
            rows.append(row)
            print(f"{name}, P = {row['examples']}, N = {width}: "
                  + ", ".join(f"{k}: {t:.2f} s" for k, t in row["seconds"].items())
                  + f"; {row['evaluations']} evaluations from {row['starts']} starts")
            ratios = ", ".join(f"{k}: {t:.1f}" if t else f"{k}: never" for k, t in row["adam_over_ours"].items())
            print(f"  Adam over ours, until the gradient is {ratios} (it ends at {row['adam_last_gradient_norm']:.0e} "
                  f"after {row['adam_steps']} steps)", flush=True)
    peak = memory(sizes[2])
    print(f"peak memory, P = {sizes[2]}, 16 paths: {peak['peak_bytes'] / 2**30:.2f} GiB, "
          f"{peak['before_bytes'] / 2**30:.2f} before")
    if write:
        path = Path(__file__).resolve().parent.parent / "results" / "benchmark-paths.json"
        about["versions"] |= {name: version(name) for name in ("numpy", "scipy")}
        record = {"kind": "benchmark", "name": path.stem, "rounds": rounds, "rows": rows, "memory": peak,
                  "provenance": about}
        write_whole(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
