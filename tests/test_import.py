"""``import kernelbook`` brings torch and little else."""

import subprocess
import sys

HEAVY = ["matplotlib", "scipy", "sklearn", "lightning_fabric", "tokenizers", "sacrebleu", "typer", "rich", "ipywidgets",
         "pandas", "IPython"]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_loads_torch_and_little_else():
    loaded = loaded_by("import kernelbook; kernelbook.attend, kernelbook.kernels, kernelbook.KernelAttention")
    assert {"torch", "kernelbook"} <= loaded
    assert not loaded & set(HEAVY)
    # what a plain import of torch does not bring, besides the standard library
    more = loaded - loaded_by("import torch, numpy") - sys.stdlib_module_names
    assert more <= {"kernelbook", "jaxtyping", "wadler_lindig"}     # the last by some versions of jaxtyping
