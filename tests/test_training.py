"""The loop: it learns, stops when asked, goes on where it stopped, and never leaves half a file."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from kernelbook.files import FileError, save_tensors
from kernelbook.training import Interrupted, Settings, fit, learning_rate, load_model

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


def test_learning_rate_rises_and_falls_in_straight_lines():
    settings = Settings(steps=100, warmup=0.1, learning_rate=2.0)
    rates = [learning_rate(t, settings) for t in range(100)]
    assert rates[9] == pytest.approx(2.0) == max(rates)
    assert rates[:10] == pytest.approx([0.2 * (t + 1) for t in range(10)])
    assert rates[10:] == pytest.approx([2.0 * (100 - t) / 90 for t in range(10, 100)])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"warmup": 2.0}, {"label_smoothing": 1.0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


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
