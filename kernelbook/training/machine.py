"""Where a model is trained: one process or several, on which devices, at which precision."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn

__all__ = ["make_fabric", "ACCELERATORS", "STRATEGIES", "PRECISIONS"]

ACCELERATORS = ("auto", "cpu", "cuda", "mps")
STRATEGIES = ("auto", "ddp", "fsdp")
PRECISIONS = ("32-true", "tf32", "bf16-mixed", "64-true")
PATIENCE = timedelta(hours=6)       # of the other processes while the first one evaluates


def make_fabric(
    *,
    accelerator: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
    log_dir: Path | str | None = None,
) -> Fabric:
    """Lightning Fabric on the devices asked for, its processes launched.

    With several devices, the first process starts the others: each runs the same command from its beginning and comes
    to this call, as under ``torchrun`` or SLURM, which start them all.  What lies before this call is therefore done
    by every process, and what is to be done once afterwards is done where ``fabric.is_global_zero``.  Several machines
    need a folder of the run that all of them see.

    Training was run with one process and with two, DDP and FSDP, on a CPU.  What needs a GPU or several machines has
    not been run yet.

    Parameters
    ----------
    accelerator : str
        ``"cpu"``, ``"cuda"`` (also called ``"gpu"``), ``"mps"``, or ``"auto"``: the best there is.
    devices : int or str
        Processes on each machine, one to a GPU; ``"auto"`` for all its GPUs.
    num_nodes : int
        Machines.
    strategy : str
        ``"ddp"`` (every process holds the whole model), ``"fsdp"`` (weights, gradients and the optimiser's moments are
        divided among the processes; torch's second version) or ``"auto"``: ``"ddp"`` if there are several processes.
    precision : str
        ``"32-true"``; ``"tf32"``, which lets matrix products of float32 round to 10 bits on an NVIDIA GPU;
        ``"bf16-mixed"``, with weights in float32; ``"64-true"``.
    log_dir : path, optional
        Folder for TensorBoard's logs.

    Returns
    -------
    Fabric

    Raises
    ------
    ValueError
        If this machine does not have what is asked for, or the choices do not go together.
    """
    accelerator = {"gpu": "cuda"}.get(accelerator, accelerator)
    for name, value, known in (("accelerator", accelerator, ACCELERATORS), ("strategy", strategy, STRATEGIES),
                               ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    accelerator = _available(accelerator)
    devices = _device_count(devices, accelerator)
    if not isinstance(num_nodes, int) or num_nodes < 1:
        raise ValueError(f"num_nodes must be a whole number, at least 1, not {num_nodes!r}")
    if accelerator == "mps" and (devices, num_nodes, strategy) != (1, 1, "auto"):
        raise ValueError("mps is a single device: it takes devices=1, num_nodes=1 and strategy='auto'")
    processes = devices * num_nodes
    if strategy == "fsdp" and processes == 1:
        raise ValueError("strategy 'fsdp' divides the model among several devices, and there is one; raise devices, "
                         "or choose 'auto'")
    if precision == "tf32" and accelerator != "cuda":
        raise ValueError(f"precision 'tf32' needs an NVIDIA GPU, and the accelerator is {accelerator!r}; "
                         "choose '32-true'")
    if precision == "64-true" and accelerator == "mps":
        raise ValueError("mps has no float64; choose precision '32-true', or the accelerator 'cpu'")
    if precision == "bf16-mixed" and accelerator == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{torch.cuda.get_device_name()} has no bfloat16; choose precision '32-true'")
    together: Any = "auto"
    if strategy == "fsdp":
        together = ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1, timeout=PATIENCE)
    elif strategy == "ddp" or processes > 1:
        together = DDPStrategy(timeout=PATIENCE)
    logger = None if log_dir is None else _tensorboard(Path(log_dir))
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=together,
                        precision="32-true" if precision == "tf32" else precision, loggers=logger)
        fabric.launch()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"accelerator {accelerator!r} with devices={devices}, num_nodes={num_nodes}, "
                         f"strategy={strategy!r} and precision={precision!r} cannot be had: {error}") from None
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    return fabric


def _available(accelerator: str) -> str:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if accelerator == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[accelerator]:
        names = ", ".join(name for name, here in there.items() if here)
        raise ValueError(f"accelerator {accelerator!r} is not available to torch {torch.__version__} on this machine "
                         f"(available: {names})")
    return accelerator


def _device_count(devices: int | str, accelerator: str) -> int:
    there = torch.cuda.device_count() if accelerator == "cuda" else 1
    if devices == "auto":
        return there
    if not str(devices).isdecimal() or int(devices) < 1:
        raise ValueError(f"devices must be a whole number, at least 1, or 'auto', not {devices!r}")
    if accelerator == "cuda" and int(devices) > there:
        raise ValueError(f"devices={devices}, but this machine has {there} GPU{'s' * (there > 1)} that torch can use")
    return int(devices)


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Divide a model among processes, layer by layer: one layer is whole at a time."""
    from torch.distributed.fsdp import fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in [layer for layers in reversed(lists) for layer in layers] + [model]:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return model


def _tensorboard(folder: Path) -> Any:
    from lightning_fabric.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(folder, name="", version="")
    except ModuleNotFoundError:
        raise ValueError(f"logs in {folder} need TensorBoard, which is not installed: pip install tensorboard, or "
                         "leave out the folder for logs") from None


def on_first(fabric: Fabric, function: Callable[[], Any]) -> Any:
    """What a function returns in the first process, which alone runs it; or the exception it raises, in all of them.

    Parameters
    ----------
    fabric : Fabric
        Of the processes, all of which make this call.
    function : callable
        Without arguments.

    Returns
    -------
    Any
        What can be pickled.
    """
    if fabric.world_size == 1:
        return function()
    outcome = None
    if fabric.is_global_zero:
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
    value, error = fabric.broadcast(outcome)
    if error is not None:
        raise error
    return value


def total(fabric: Fabric, *values: float) -> list[float]:
    """Each value summed over all processes."""
    if fabric.world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=fabric.device)
    torch.distributed.all_reduce(sums)      # Fabric's own waits for all processes once more
    return sums.tolist()


def gathered(fabric: Fabric, tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, of one shape, one below the other."""
    if fabric.world_size == 1:
        return tensor[None]
    every = [torch.empty_like(tensor, device=fabric.device) for _ in range(fabric.world_size)]
    torch.distributed.all_gather(every, tensor.to(fabric.device))
    return torch.stack(every)
