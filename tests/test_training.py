"""The loop: it learns, stops when asked, goes on where it stopped, and never leaves half a file.

Run as a script, this file trains until it is killed: ``python test_training.py STATE``.
"""

import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from torch import nn

from kernelbook import files
from kernelbook.files import FileError, save_tensors
from kernelbook.training import (
    Interrupted,
    OutOfMemory,
    Settings,
    estimate,
    fit,
    learning_rate,
    load_model,
    make_fabric,
)

SETTINGS = Settings(steps=13, learning_rate=0.05, seed=3)


class Line:
    """Least squares on 20 points, five batches an epoch; dropout makes it depend on the random state."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(20, 3, generator=g)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def batches(self, epoch):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(epoch)).tolist()
        return [order[i:i + 4] for i in range(0, 20, 4)]

    def loss(self, model, indices, device):
        return (model(self.x[indices]) - self.y[indices]).square().mean(), len(indices)

    def validate(self, model, device):
        return {"valid_loss": (model(self.x) - self.y).square().mean().item()}


def line_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def run(path, settings=SETTINGS, task=None, **more):
    model = line_model()
    history = fit(model, task or Line(), settings, fabric=Fabric(accelerator="cpu"), state_path=path, **more)
    return model, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns_and_stops_at_the_last_step(tmp_path):
    steps = []
    _, history = run(tmp_path / "s", report=lambda e: steps.append(e.get("step")))
    assert [s for s in steps if s] == list(range(1, 14))
    assert [h["step"] for h in history] == [5, 10, 13]
    assert history[-1]["valid_loss"] < 0.7 * history[0]["valid_loss"]


def test_it_is_the_plain_loop(tmp_path):
    class Uneven(Line):
        def batches(self, epoch):
            order = sum(super().batches(epoch), [])
            return [order[i:i + 6] for i in range(0, 20, 6)]

    settings, task = replace(SETTINGS, weight_decay=0.5, clip=0.5), Uneven()
    model, history = run(tmp_path / "s", settings, task)
    plain, step = line_model(), 0
    torch.manual_seed(settings.seed + 1)
    optimiser = torch.optim.AdamW([{"params": [plain[0].weight, plain[2].weight], "weight_decay": 0.5},
                                   {"params": [plain[0].bias, plain[2].bias], "weight_decay": 0.0}], betas=(0.9, 0.98))
    for epoch in range(4):
        losses = []
        for indices in task.batches(epoch)[:13 - step]:
            optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = learning_rate(step, settings)
            optimiser.zero_grad()
            loss, count = task.loss(plain.train(), indices, "cpu")
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimiser.step()
            step, losses = step + 1, losses + [loss.item()] * count
        assert history[epoch]["train_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-6)
        assert history[epoch]["valid_loss"] == pytest.approx(task.validate(plain.eval(), "cpu")["valid_loss"], abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("at", [1, 5, 8, 12, 13])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_and_resumed_ends_with_the_same_weights(tmp_path, at, number):
    whole, expected = run(tmp_path / "whole")

    def stop(event):
        if event.get("step") == at:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match=f"after step {at} of 13"):
        run(tmp_path / "s", report=stop)
    torch.manual_seed(99)                       # whatever the next process begins with
    resumed, history = run(tmp_path / "s", resume=True)
    assert same(whole, resumed) and history == expected


def test_a_second_ctrl_c_stops_at_once_and_afterwards_signals_are_as_before(tmp_path):
    before, steps = signal.getsignal(signal.SIGINT), []

    def stop(event):
        steps.append(event["step"])
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", report=stop)
    assert steps == [1] and not (tmp_path / "s").exists() and signal.getsignal(signal.SIGINT) is before


EVERYTHING = replace(SETTINGS, steps=24, schedule="cosine", average=0.7, patience=4, validate_every=3, save_every=0.0)


def die_while_the_state_of_step_18_is_written(state):
    replaced = 0

    def replace_or_die(*paths):
        nonlocal replaced
        replaced += 1
        if replaced == 18:
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(*paths)

    files.os.replace = replace_or_die
    run(state, EVERYTHING)


def test_a_run_killed_in_the_middle_of_an_epoch_and_resumed_ends_with_the_same_weights(tmp_path):
    whole, expected = run(tmp_path / "whole", EVERYTHING)
    process = subprocess.run([sys.executable, __file__, str(tmp_path / "s")], timeout=120, capture_output=True,
                             env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(tmp_path.glob(".s.*.tmp"))) == 1
    steps = []
    resumed, history = run(tmp_path / "s", EVERYTHING, resume=True, report=lambda e: steps.append(e.get("step")))
    assert steps[0] == 18 and same(whole, resumed) and history == expected
    assert not list(tmp_path.glob(".s.*.tmp"))


def test_the_state_is_saved_inside_an_epoch_when_time_is_up(tmp_path):
    there = []
    for minutes in (0.0, math.inf):
        path = tmp_path / str(minutes)
        run(path, replace(SETTINGS, save_every=minutes),
            report=lambda e, path=path: there.append(path.exists()) if "step" in e else None)
    assert there == [False] + 12 * [True] + 5 * [False] + 8 * [True]


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: pickle.dumps(Bomb())])
def test_a_damaged_state_is_refused_and_no_code_in_it_runs(tmp_path, damage):
    run(tmp_path / "s")
    content = damage((tmp_path / "s").read_bytes())
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(FileError, match="damaged, cut short, or something else"):
        run(tmp_path / "s", resume=True)
    assert (tmp_path / "s").read_bytes() == content


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code in the file was executed",)


def test_a_state_without_all_its_parts_is_refused(tmp_path):
    run(tmp_path / "s")
    tensors, metadata = files.load_tensors(tmp_path / "s")
    for less in ({"tensors": {k: t for k, t in tensors.items() if k != "random.cpu"}, "metadata": metadata},
                 {"tensors": tensors, "metadata": metadata | {"position": {"lap": 3}}}):
        save_tensors(tmp_path / "s", **less)
        with pytest.raises(FileError, match="lacks a part of the state.*begin anew"):
            run(tmp_path / "s", resume=True)


def test_accumulate_may_change_when_a_run_is_resumed(tmp_path):
    def stop(event):
        if event.get("step") == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path / "s", report=stop)
    _, history = run(tmp_path / "s", replace(SETTINGS, accumulate=2, save_every=1.0), resume=True)
    assert history[-1]["step"] == 13


def test_another_seed_is_another_run(tmp_path):
    assert not same(run(tmp_path / "a")[0], run(tmp_path / "b", replace(SETTINGS, seed=4))[0])


def test_the_state_of_another_run_is_refused(tmp_path):
    run(tmp_path / "s", about={"kernel": {"bounds": (0, 1)}})
    with pytest.raises(FileError, match="another run.*learning_rate"):
        run(tmp_path / "s", replace(SETTINGS, learning_rate=0.1), about={"kernel": {"bounds": (0, 1)}}, resume=True)
    with pytest.raises(FileError, match="another run.*kernel"):
        run(tmp_path / "s", about={"kernel": {"bounds": (0, 2)}}, resume=True)
    run(tmp_path / "s", about={"kernel": {"bounds": (0, 1)}}, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(Line):
        def loss(self, model, indices, device):
            loss, count = super().loss(model, indices, device)
            return loss * float("nan"), count

    with pytest.raises(FloatingPointError, match="step 1 of 13.*learning rate"):
        run(tmp_path / "s", task=Broken())


def test_weights_that_are_lost_in_the_last_step_are_no_result(tmp_path):
    class Spoiled(Line):
        def validate(self, model, device):
            return {"valid_loss": float("nan")}

    with pytest.raises(FloatingPointError, match="valid_loss not finite after step 5 of 13"):
        run(tmp_path / "s", task=Spoiled())
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("lack", [lambda: torch.empty(1 << 50), lambda: raising(MemoryError()),
                                  lambda: raising(torch.OutOfMemoryError("CUDA out of memory. Tried ..."))])
def test_where_memory_runs_out_the_settings_that_help_are_named_and_the_state_is_kept(tmp_path, lack):
    class Big(Line):
        def loss(self, model, indices, device):
            if self.large:
                lack()
            return super().loss(model, indices, device)

    task = Big()
    task.large = True
    with pytest.raises(OutOfMemory, match=r"step 1 of 13 .*raise accumulate \(it is 1\).*batch_tokens \(4096\)") as e:
        run(tmp_path / "s", task=task)
    assert "resumed" not in str(e.value)
    with pytest.raises(OutOfMemory):
        estimate(line_model(), task, SETTINGS, Fabric(accelerator="cpu"))
    task.large = False
    run(tmp_path / "s", task=task)
    kept = (tmp_path / "s").read_bytes()
    task.large = True
    with pytest.raises(OutOfMemory, match="The state saved last is kept in .*s: with a larger accumulate"):
        run(tmp_path / "s", task=task)
    assert (tmp_path / "s").read_bytes() == kept


def raising(error):
    raise error


def test_another_error_is_no_lack_of_memory(tmp_path):
    class Wrong(Line):
        def loss(self, model, indices, device):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        run(tmp_path / "s", task=Wrong())


def test_without_examples_there_is_nothing_to_train_on(tmp_path):
    class Empty(Line):
        def batches(self, epoch):
            return []

    with pytest.raises(ValueError, match="epoch 1 has no batch"):
        run(tmp_path / "s", task=Empty())


class Watched(Line):
    """Keeps the weights that are validated; the validation losses are given."""

    def __init__(self, losses):
        super().__init__()
        self.losses, self.seen = iter(losses), []

    def validate(self, model, device):
        assert not model.training
        self.seen.append(copy_of(model))
        return {"valid_loss": next(self.losses)}


def copy_of(model):
    return [p.detach().clone() for p in model.parameters()]


def test_the_average_of_the_weights_is_what_is_validated_and_returned(tmp_path):
    settings, task = replace(SETTINGS, average=0.6), Watched([1.0, 1.0, 1.0])
    model, trail = line_model(), []
    torch.manual_seed(7)
    fit(model, task, settings, fabric=Fabric(accelerator="cpu"), state_path=tmp_path / "s",
        report=lambda e: trail.append(copy_of(model)) if "step" in e else None)
    weights = 0.6 ** torch.arange(12, -1, -1.0)
    means = [(weights.view(-1, *[1] * p[0].ndim) * torch.stack(p)).sum(0) / weights.sum()
             for p in zip(*trail, strict=True)]
    for got, last, mean in zip(model.parameters(), task.seen[-1], means, strict=True):
        assert torch.equal(got, last) and torch.allclose(got, mean, atol=1e-6)
    plain, _ = run(tmp_path / "plain")      # the weights that are trained are not touched by the average
    assert all(torch.equal(a, b) for a, b in zip(trail[-1], plain.parameters(), strict=True))


def test_after_one_step_the_average_is_the_weights(tmp_path):
    one = replace(SETTINGS, steps=1)
    assert same(run(tmp_path / "a", one)[0], run(tmp_path / "b", replace(one, average=0.999))[0])


def test_patience_ends_the_run_with_the_best_weights(tmp_path):
    settings, task, events = replace(SETTINGS, patience=2, validate_every=2), Watched([3.0, 2.0, 2.5, 2.0, 1.0]), []
    model, history = run(tmp_path / "s", settings, task, report=events.append)
    assert [(h["step"], h["valid_loss"]) for h in history[:-1]] == [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.0)]
    assert history[-1] == history[1] | {"stopped": 8} and events[-1] == {"stopped": 8, "best": 4}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), task.seen[1], strict=True))
    again, same_history = run(tmp_path / "s", settings, task, resume=True)
    assert same(model, again) and same_history == history


def test_with_patience_a_whole_run_ends_with_the_best_weights_too(tmp_path):
    task, events = Watched([3.0, 1.0, 2.0]), []
    model, history = run(tmp_path / "s", replace(SETTINGS, patience=2), task, report=events.append)
    assert [h["step"] for h in history] == [5, 10, 13, 10] and history[-1] == history[1] | {"stopped": 13}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), task.seen[1], strict=True))
    assert not any("stopped" in e for e in events)      # not early
    _, history = run(tmp_path / "t", replace(SETTINGS, patience=2), Watched([3.0, 2.0, 1.0]))
    assert [h["step"] for h in history] == [5, 10, 13] and not any("stopped" in h for h in history)


def test_validation_comes_when_asked_and_at_the_end(tmp_path):
    losses = []
    _, history = run(tmp_path / "s", replace(SETTINGS, validate_every=4),
                     report=lambda e: losses.append(e["loss"]) if "loss" in e else None)
    assert [(h["step"], h["epoch"]) for h in history] == [(4, 1), (8, 2), (12, 3), (13, 3)]
    assert history[1]["train_loss"] == pytest.approx(sum(losses[4:8]) / 4, abs=1e-6)


def test_what_is_reported_is_logged(tmp_path):
    class Kept(Logger):
        name = version = "kept"

        def __init__(self):
            self.logged, self.ends = [], []

        def log_metrics(self, metrics, step=None):
            self.logged.append((step, metrics))

        def log_hyperparams(self, params):
            raise NotImplementedError

        def finalize(self, status):
            self.ends.append(status)

    kept = Kept()
    fit(line_model(), Line(), SETTINGS, fabric=Fabric(accelerator="cpu", loggers=kept), state_path=tmp_path / "s")
    assert [step for step, m in kept.logged if "train_loss" in m] == list(range(1, 14)) and kept.ends == ["success"]
    assert [step for step, m in kept.logged if "valid_loss" in m] == [5, 10, 13]
    assert kept.logged[0][1]["learning_rate"] == learning_rate(0, SETTINGS)


def test_an_estimate_counts_the_plan_and_changes_nothing():
    class Long(Line):
        def batches(self, epoch):
            order = sum(super().batches(epoch), [])
            return [order[:2], order[2:12], order[12:]]

        def loss(self, model, indices, device):
            loss, count = super().loss(model, indices, device)
            return loss, 5 * count

    model = line_model()
    before, random = copy_of(model), torch.get_rng_state()
    found = estimate(model, Long(), replace(SETTINGS, steps=30, average=0.5), Fabric(accelerator="cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert found.pop("seconds") > 0
    assert found == {"parameters": 41, "steps": 30, "tokens_per_step": pytest.approx(100 / 3), "tokens": 1000}


def test_learning_rate_rises_and_falls_in_straight_lines():
    settings = Settings(steps=100, warmup=0.1, learning_rate=2.0)
    rates = [learning_rate(t, settings) for t in range(100)]
    assert rates[9] == pytest.approx(2.0) == max(rates)
    assert rates[:10] == pytest.approx([0.2 * (t + 1) for t in range(10)])
    assert rates[10:] == pytest.approx([2.0 * (100 - t) / 90 for t in range(10, 100)])


def test_learning_rate_has_other_shapes():
    def rates(schedule, **more):
        settings = Settings(steps=100, warmup=0.2, learning_rate=2.0, schedule=schedule, **more)
        return [learning_rate(t, settings) for t in range(100)]

    for schedule in ("cosine", "inverse-sqrt", "constant"):
        assert rates(schedule)[:21] == pytest.approx([0.1 * min(t + 1, 20) for t in range(21)])
        assert min(rates(schedule)) > 0
    assert rates("cosine")[60] == pytest.approx(1.0) and rates("cosine")[99] == pytest.approx(0, abs=1e-2)
    assert rates("inverse-sqrt")[80] == pytest.approx(1.0)
    assert rates("constant")[99] == 2.0


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"steps": 1.5}, {"steps": "9"}, {"steps": True}, {"learning_rate": 0.0}, {"learning_rate": math.nan},
    {"warmup": 2.0}, {"label_smoothing": 1.0}, {"clip": 0}, {"seed": -1}, {"schedule": "line"}, {"accumulate": 0},
    {"average": 1.0}, {"average": "much"}, {"patience": -1}, {"validate_every": 0}, {"save_every": -1.0},
])
def test_settings_out_of_range_are_named(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, not {value!r}$"):
        Settings(**wrong)


# ------------------------------------------------------------------------- the machine

@pytest.mark.parametrize(("asked", "message"), [
    ({"accelerator": "tpu"}, "accelerator must be one of auto, cpu, cuda, mps, not 'tpu'"),
    ({"accelerator": "gpu"}, r"accelerator 'cuda' is not available .*\(available: cpu\)"),
    ({"strategy": "deepspeed"}, "strategy must be one of auto, ddp, fsdp, not 'deepspeed'"),
    ({"strategy": "fsdp"}, "strategy 'fsdp' divides the model among several devices.*raise devices"),
    ({"precision": "16-mixed"}, "precision must be one of 32-true, tf32, bf16-mixed, 64-true, not '16-mixed'"),
    ({"precision": "tf32"}, "precision 'tf32' needs an NVIDIA GPU.*choose '32-true'"),
    ({"devices": 0}, "devices must be a whole number, at least 1, or 'auto', not 0"),
    ({"devices": "two"}, "devices must be .*not 'two'"),
    ({"num_nodes": 0}, "num_nodes must be a whole number, at least 1, not 0"),
])
def test_what_this_machine_does_not_have_is_named(monkeypatch, asked, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        make_fabric(**{"accelerator": "cpu"} | asked)


def test_what_these_gpus_cannot_do_is_named(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2), ("is_bf16_supported", False),
                        ("get_device_name", "An old one")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(ValueError, match="devices=3, but this machine has 2 GPUs"):
        make_fabric(accelerator="cuda", devices=3)
    with pytest.raises(ValueError, match="An old one has no bfloat16; choose precision '32-true'"):
        make_fabric(accelerator="cuda", precision="bf16-mixed")


def test_on_a_machine_without_gpu_the_best_there_is_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for devices in (1, "1", "auto"):
        fabric = make_fabric(devices=devices)
        assert fabric.device.type == "cpu" and fabric.world_size == 1


def test_without_tensorboard_logging_says_what_to_install(monkeypatch, tmp_path):
    from lightning_fabric.loggers import tensorboard

    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(tensorboard, name, False)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        make_fabric(accelerator="cpu", log_dir=tmp_path)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_learn_on_the_cpu(tmp_path, precision):
    history = fit(line_model(), Line(), SETTINGS, fabric=make_fabric(accelerator="cpu", precision=precision),
                  state_path=tmp_path / "s")
    assert history[-1]["valid_loss"] < 0.7 * history[0]["valid_loss"]


# ------------------------------------------------------------------------- the finished model

def test_an_unfinished_run_is_not_a_model(tmp_path):
    run(tmp_path / "state.safetensors")
    with pytest.raises(FileError, match="unfinished run.*--resume"):
        load_model(tmp_path)
    with pytest.raises(FileError, match="not a finished model"):
        load_model(tmp_path / "state.safetensors")


@pytest.mark.parametrize("config", [None, {"architecture": "decoder"}, {"kernel": {"kernel": "edp"}, "wings": 2}])
def test_a_model_without_a_whole_configuration_is_refused(tmp_path, config):
    path = save_tensors(tmp_path / "m.safetensors", {}, {"kind": "model"} | ({"config": config} if config else {}))
    with pytest.raises(FileError, match="configuration in .*m.safetensors cannot be read"):
        load_model(path)


if __name__ == "__main__":
    die_while_the_state_of_step_18_is_written(Path(sys.argv[1]))
