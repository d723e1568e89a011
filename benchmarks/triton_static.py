"""What Triton's tiles cost, read off the GPU's machine code: ``python benchmarks/triton_static.py [RULE]``.

The kernels are compiled for compute capability 9.0 without a GPU, taken apart with the tools that come with Triton, and
their instructions counted: for each pair of a query and a key, in each of the loops over the coordinates, and over all,
with what a tile does once.  No time is measured: how many instructions run at once, and how long they wait for memory,
only a GPU can show.  For the rule ``min(q, k)`` the fewest possible are 2 (a minimum and an addition), and 3 for its
derivative (a subtraction, a saturating multiply-add, and a multiply-add).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from kernelbook.attention.triton_tiles import Tiles, compiled
from kernelbook.rules import Rule

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CASES = [(torch.bfloat16, 64), (torch.float32, 64), (torch.bfloat16, 128)]


def tool(name: str, content: bytes, *options: str) -> str:
    """What a tool of the compiler says of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def loops(cubin: bytes) -> list[tuple[int, int]]:
    """First and last instruction of each loop, in order of their first."""
    places, jumps, count = {}, [], 0
    for line in tool("nvdisasm", cubin, "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = count
        elif re.match(r"\s*/\*[0-9a-f]+\*/\s", line):
            if jump := re.search(r"\bBRA\b.*(\.L_x_\d+)", line):
                jumps.append((count, jump[1]))
            count += 1
    return sorted((places[label], at) for at, label in jumps if places.get(label, count) < at)


def main(text: str) -> None:
    t = Tiles()
    pairs = 2 * t.a * t.b           # of a thread
    print(f"rule {text}, tiles of {2 * t.a * t.r} x {t.b * t.c}, {pairs} pairs for each of {32 * t.warps} threads")
    print(f"{'':<26}{'':>10}{'spilled':>9}{'shared':>8}   instructions for each pair and coordinate\n{'kernel':<26}"
          f"{'registers':>10}{'bytes':>9}{'bytes':>8}{'sum':>8}{'slope':>8}{'over all':>10}{'useful':>8}")
    for dtype, d in CASES:
        form = (Rule(text), "exp", d**-0.5)
        for name, kernel in compiled(form, d=d, d_v=d, dtype=dtype, causal=True).items():
            usage = tool("ptxas", kernel.asm["ptx"].encode(), "-v", "--gpu-name=sm_90a", "-o", "/dev/null")
            registers = int(re.search(r"Used (\d+) registers", usage)[1])
            spilled = int(re.search(r"(\d+) bytes spill stores", usage)[1])
            found = loops(kernel.asm["cubin"])
            inner = [(a, b) for a, b in found if not any((a, b) != o and a <= o[0] and o[1] <= b for o in found)]
            tile = max(found, key=lambda loop: loop[1] - loop[0])
            inner = [b - a + 1 for a, b in inner if tile[0] <= a and b <= tile[1]]
            assert len(inner) == 1 + (name != "forward"), "the loops are not those that are expected"
            runs = [d // t.unroll, d][:len(inner)]
            whole = tile[1] - tile[0] + 1 + sum(n * (r - 1) for n, r in zip(inner, runs, strict=True))
            each = [n / pairs / u for n, u in zip(inner, (t.unroll, 1), strict=False)]
            useful = (2 if name == "forward" else 5) / (whole / pairs / d) if text == "min(q, k)" else None
            print(f"{f'{name}, {dtype}'.replace('torch.', ''):<19}d={d:<5}{registers:>10}{spilled:>9}"
                  f"{kernel.metadata.shared:>8}{each[0]:>8.2f}{f'{each[1]:.2f}' if each[1:] else '':>8}"
                  f"{whole / pairs / d:>10.2f}{f'{useful:.0%}' if useful else '':>8}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "min(q, k)")
