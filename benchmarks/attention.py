"""What attention costs: ``python benchmarks/attention.py [OPTIONS]``, those of ``kernelbook bench``.

Every kernel and path, and other libraries where they are installed (``pip install kernelbook[bench]``), are timed
against torch's fused attention, in one process and in turn; kernelbook/bench.py says how.  Without --out, --quick and
--only the record is results/benchmark-attention-DEVICE.json, which the book reads.
"""

import os
import sys
from pathlib import Path

from kernelbook import cli


def main(options: list[str]) -> None:
    if not any(option.split("=")[0] in ("--out", "--quick", "--only", "--help") for option in options):
        device = "cuda" if any("cuda" in option for option in options) else "cpu"
        # Relative where it can be: the record holds the command, and should name no folder of one machine.
        record = Path(__file__).resolve().parent.parent / "results" / f"benchmark-attention-{device}.json"
        options = [*options, "--out", os.path.relpath(record)]
    sys.argv = ["kernelbook", "bench", *options]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
