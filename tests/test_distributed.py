"""Two processes on one CPU do what one does, and stop, fail and go on together.

Run as a script, this file is what the two processes do: ``python test_distributed.py FOLDER``.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from kernelbook.files import FileError, load_tensors, save_tensors
from kernelbook.training import Interrupted, Settings, fit, make_fabric

SETTINGS = Settings(steps=9, learning_rate=0.05, clip=0.5, average=0.8, patience=3, validate_every=2, seed=3)


class Curves:
    """Least squares on 10 examples of 1 to 3 targets each, in batches of 5, 4 and 1: no two shares are alike."""

    def __init__(self, kill_in_step=None):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(10, 3, 4, generator=g, dtype=torch.float64)
        self.targets = torch.tensor([1, 3, 2, 1, 1, 3, 2, 3, 1, 2])
        self.validated, self.calls, self.kill_in_step = 0, 0, kill_in_step

    def batches(self, epoch):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[:5], order[5:9], order[9:]]

    def loss(self, model, indices, device):
        self.calls += 1
        if self.calls == 1:     # what dropout will draw, without drawing it
            self.drawn = torch.rand(4, generator=torch.Generator().set_state(torch.get_rng_state())).tolist()
        if self.calls == self.kill_in_step:
            os.kill(os.getpid(), signal.SIGTERM)
        x, there = self.x[indices], torch.arange(3) < self.targets[indices, None]
        error = (model(x).squeeze(-1) - x.sum(-1).sin())[there]
        return error.square().mean(), int(there.sum())

    def validate(self, model, device):
        self.validated += 1
        return {"valid_loss": (model(self.x).squeeze(-1) - self.x.sum(-1).sin()).square().mean().item()}


class Net(nn.Module):
    """Two layers, which FSDP divides one by one."""

    def __init__(self, dropout):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 1)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.layers[1](self.dropout(self.layers[0](x).tanh()))


def run(fabric, path, settings=SETTINGS, dropout=0.0, task=None, **more):
    torch.manual_seed(0)
    model, losses = Net(dropout).double(), []
    history = fit(model, task or Curves(), settings, fabric=fabric, state_path=path,
                  report=lambda e: losses.append((e["loss"], e["tokens"])) if "loss" in e else None, **more)
    return model.state_dict(), losses, history


def main(folder):
    """What each of the two processes does; it leaves what it found in files of its own."""
    torch.set_num_threads(1)
    ddp, fsdp = (make_fabric(accelerator="cpu", devices=2, strategy=strategy) for strategy in ("ddp", "fsdp"))
    mine = folder / str(ddp.global_rank)
    found = {"processes": ddp.world_size}
    parts = replace(SETTINGS, accumulate=3)
    for name, fabric, settings in (("ddp", ddp, SETTINGS), ("ddp parts", ddp, parts), ("fsdp parts", fsdp, parts)):
        task = Curves()
        weights, found[f"{name} losses"], found[f"{name} history"] = run(fabric, folder / name, settings, task=task)
        save_tensors(mine / name, weights, {})
        found |= {f"{name} validated": task.validated, f"{name} drawn": task.drawn}
    for name, fabric in (("ddp", ddp), ("fsdp", fsdp)):
        save_tensors(mine / f"{name} dropout", run(fabric, folder / "whole", dropout=0.3)[0], {})
        state = folder / f"{name} stopped"
        try:        # a request to end that reaches the second process only
            run(fabric, state, dropout=0.3, task=Curves(4 if fabric.global_rank else None))
        except Interrupted as stop:
            found[f"{name} stopped"] = str(stop)
        torch.manual_seed(99)
        save_tensors(mine / f"{name} resumed", run(fabric, state, dropout=0.3, resume=True)[0], {})
    (folder / "file").write_text("")
    try:        # what goes wrong in the first process only
        run(ddp, folder / "file" / "state")
    except FileError as error:
        found["failed"] = str(error)
    (mine / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / rank / "found.json").read_text()) for rank in "01"]


def weights_of(folder, rank, name):
    return load_tensors(folder / str(rank) / name)[0]


def equal(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance for k in a)


@pytest.mark.parametrize("name", ["ddp", "ddp parts", "fsdp parts"])
def test_two_processes_reach_the_loss_and_weights_of_one(two, tmp_path, name):
    folder, (first, second) = two
    weights, losses, history = run(Fabric(accelerator="cpu"), tmp_path / "s")
    assert first["processes"] == second["processes"] == 2
    assert first[f"{name} losses"] == [pytest.approx(pair, rel=0, abs=1e-10) for pair in losses]
    assert first[f"{name} history"] == second[f"{name} history"] == [pytest.approx(h, abs=2e-6) for h in history]
    assert equal(weights_of(folder, 0, name), weights, 1e-10)
    if name != "fsdp parts":        # with FSDP the first process alone gets the weights
        assert equal(weights_of(folder, 0, name), weights_of(folder, 1, name))


@pytest.mark.parametrize("parts", [2, 3, 100])
def test_a_batch_in_parts_is_the_whole_batch(tmp_path, parts):
    one = Fabric(accelerator="cpu")
    weights, losses, _ = run(one, tmp_path / "a")
    split, same_losses, _ = run(one, tmp_path / "b", replace(SETTINGS, accumulate=parts))
    assert same_losses == [pytest.approx(pair, rel=0, abs=1e-10) for pair in losses] and equal(split, weights, 1e-10)


@pytest.mark.parametrize("name", ["ddp", "fsdp parts"])
def test_the_first_process_alone_validates_and_reports(two, name):
    _, (first, second) = two
    assert (first[f"{name} validated"], second[f"{name} validated"]) == (5, 0)
    assert len(first[f"{name} losses"]) == 9 and second[f"{name} losses"] == []


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_request_to_one_process_stops_both_at_the_same_step_and_they_go_on_exactly(two, name):
    folder, (first, second) = two
    assert first[f"{name} stopped"] == second[f"{name} stopped"] and "after step 4 of 9" in first[f"{name} stopped"]
    for rank in (0, 1):
        assert equal(weights_of(folder, rank, f"{name} resumed"), weights_of(folder, rank, f"{name} dropout"))
    assert not equal(weights_of(folder, 0, f"{name} dropout"), weights_of(folder, 0, "ddp"), 1e-6)


def test_each_process_drops_out_what_it_draws_itself(two):
    _, (first, second) = two
    assert first["ddp drawn"] == first["fsdp parts drawn"] != second["ddp drawn"]


def test_an_error_in_the_first_process_is_one_in_both(two):
    _, (first, second) = two
    assert first["failed"] == second["failed"] and "was not written" in first["failed"]


def test_the_state_of_two_processes_is_refused_by_one(two):
    folder, _ = two
    with pytest.raises(FileError, match="state of 2 processes, and here are 1.*as many devices"):
        run(Fabric(accelerator="cpu"), folder / "ddp stopped", dropout=0.3, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
