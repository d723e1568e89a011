"""How much longer ``import kernelbook`` takes than ``import torch``: ``python benchmarks/import_time.py [RUNS]``.

Each run starts three fresh interpreters, in turn, so that a slow moment of the machine hits all alike: one that imports
nothing, one that imports torch, and one that imports kernelbook (and with it torch).  The first round only warms the
file cache and is not counted.  The aim is 0.2 s over torch.
"""

import os
import platform
import statistics
import subprocess
import sys
import time

import torch

AIM = 0.2
STATEMENTS = {"nothing": "pass", "torch": "import torch", "kernelbook": "import kernelbook"}


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main(runs: int) -> None:
    rounds = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(runs + 1)][1:]
    median = {name: statistics.median(r[name] for r in rounds) for name in STATEMENTS}
    over = [r["kernelbook"] - r["torch"] for r in rounds]
    print(f"python -c 'import kernelbook' against python -c 'import torch', {runs} interleaved runs, medians")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs")
    for name, value in median.items():
        print(f"{name:<12} {value:6.3f} s (fastest {min(r[name] for r in rounds):.3f} s)")
    ratio = statistics.median(r["kernelbook"] / r["torch"] for r in rounds)
    print(f"kernelbook over torch: {statistics.median(over):.3f} s (from {min(over):.3f} to {max(over):.3f}), "
          f"ratio {ratio:.3f}; aim {AIM} s: {'met' if statistics.median(over) <= AIM else 'missed'}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
