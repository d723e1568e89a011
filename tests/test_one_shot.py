"""One-shot classification: a network of attention paths by its definition, and a task that draws its own episodes."""

import dataclasses
import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelbook import attention, data, results, tasks
from kernelbook.files import FileError, load_tensors, save_tensors
from kernelbook.models import TransformerConfig
from kernelbook.paths import (
    PathNetwork,
    PathNetworkConfig,
    QueryKeyAttention,
    network_output,
    order_parameter,
    output_of_paths,
    path_inputs,
)
from kernelbook.paths.one_shot import nearest
from kernelbook.tasks.one_shot import PRESETS, OneShot, prepare
from kernelbook.training import Settings, load_model, save_model

DIGITS = data.load_images("digits")
SETTINGS = Settings(batch_tokens=48 * 8, label_smoothing=0.0)
SIZES = {"size": 32, "rotations": True, "epoch_episodes": 20, "valid_episodes": 12, "test_episodes": 16}


@pytest.fixture(autouse=True)
def no_corpora(monkeypatch):
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)


def task(options=SETTINGS, corpus=DIGITS, **sizes):
    return OneShot(corpus, options, **SIZES | sizes)


def make(seed=0, **sizes):
    torch.manual_seed(seed)
    return PathNetworkConfig(**{"features": 6, "width": 5, "qk_width": 3} | sizes).build().double()


def sequences(count=4, features=6, tokens=5, seed=0):
    return torch.randn(count, features, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------- the network

KERNELS = [("edp", "sum"), ("rbf", "sum"), ("l2", "sum"), ("quadratic", "sum"), ("linear", "abs-sum"),
           ("exponentiated_intersection", "signed-sum"), ("rbf", "count")]


@settings(max_examples=10)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sampled_from(KERNELS), st.integers(0, 99))
def test_output_and_gradient_are_those_of_the_definition(heads, kernel, seed):
    name, normaliser = kernel
    network = make(seed, layers=len(heads), heads=",".join(map(str, heads)), kernel=name, normaliser=normaliser,
                   width=",".join(str(4 + i) for i in range(len(heads) + 1)))
    assert network.config.head_counts == tuple(heads)
    x, y = sequences(seed=seed), torch.tensor([1.0, -1, -1, 1]).double()
    # Attention by the definition of its kernel, head by head; then layer after layer, token by token.
    omega = [torch.stack([attention.weights(x.mT @ Q.mT / math.sqrt(6), x.mT @ K.mT / math.sqrt(6), name,
                                            normaliser=normaliser).mT for Q, K in zip(queries, keys, strict=True)])
             for queries, keys in zip(network.queries, network.keys, strict=True)]
    f = network_output(list(network.weights), x, omega, torch.full((5,), 1 / 5, dtype=torch.float64))
    torch.testing.assert_close(network(x), f, rtol=1e-9, atol=1e-11)
    for mine, wanted in zip(network.attention(x), omega, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-11)
    parameters = list(network.parameters())
    for mine, wanted in zip(torch.autograd.grad((network(x) - y).square().mean(), parameters),
                            torch.autograd.grad((f - y).square().mean(), parameters), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-10)


def test_by_default_it_is_the_network_of_the_literature():
    config = PathNetworkConfig(192)
    assert (config.head_counts, config.widths, config.qk_width) == ((4, 4), (512, 512, 512), 128)
    network = make(heads="2,3")
    same = QueryKeyAttention(6, (2, 3), 3)
    for mine, theirs in ((network.queries, same.queries), (network.keys, same.keys)):
        for V, W in zip(mine, theirs, strict=True):
            W.data = V.data / math.sqrt(6)
    for a, b in zip(network.attention(sequences()), same(sequences()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_its_attention_is_what_the_theory_takes():
    network, x = make(heads="2,3"), sequences()
    xi = path_inputs(x, [omega.detach() for omega in network.attention(x)], network.readout(x))
    torch.testing.assert_close(output_of_paths(list(network.weights), xi), network(x), rtol=1e-9, atol=1e-11)
    assert torch.equal(network.order_parameter(), order_parameter(list(network.weights)))
    assert network.parameter_count == 2 * (2 + 3) * 3 * 6 + 5 * 6 + (2 + 3) * 5 * 5 + 5


def test_heads_that_are_left_out_are_those_of_a_smaller_network():
    network, x = make(heads="3,2"), sequences()
    for removed in ([(0, 1)], [(0, 0), (0, 2)], [(1, 0)], [(0, 1), (1, 1)]):
        small = make(heads="3,2")
        for layer in (0, 1):
            left = [h for h in range(network.config.head_counts[layer]) if (layer, h) not in removed]
            for mine, whole in ((small.queries, network.queries), (small.keys, network.keys)):
                mine[layer].data = whole[layer].data[left]
            small.weights[layer + 1].data = network.weights[layer + 1].data[left]
        # With fewer heads the sum is divided by the root of their number.
        omega = [torch.softmax(torch.einsum("hgi,pis,hgj,pjt->hpst", K, x, Q, x) / 6 / math.sqrt(3), -2)
                 for Q, K in zip(small.queries, small.keys, strict=True)]
        wanted = network_output(list(small.weights), x, omega, network.readout(x))
        torch.testing.assert_close(network(x, removed), wanted, rtol=1e-9, atol=1e-11)
    assert torch.equal(network(x, []), network(x))
    for removed, words in (([(0, 3)], "head 3 of layer 0 is out of range"), ([(2, 0)], "layer 2 is out of range"),
                           ([(1, 0), (1, 1)], "all 2 heads of layer 1")):
        with pytest.raises(ValueError, match=words):
            network(x, removed)


def test_a_configuration_survives_being_stored():
    config = PathNetworkConfig(64, layers=3, heads="4,2,1", width="8,8,8,8", kernel="rbf")
    assert PathNetworkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.width == 8 and config.widths == (8, 8, 8, 8) and config.heads == "4,2,1"
    assert PathNetworkConfig(64, heads="4,4") == PathNetworkConfig(64, heads=4)


@pytest.mark.parametrize(("change", "words"), [
    ({"heads": "4,2,1"}, "heads must be .* or 2 of them for the layers, as in '4,4', not '4,2,1'"),
    ({"heads": "4,x"}, "heads must be"), ({"heads": 0}, "heads must be"), ({"heads": "4,"}, "heads must be"),
    ({"heads": "2,-1"}, "heads must be"), ({"heads": True}, "heads must be"), ({"heads": 2.0}, "heads must be"),
    ({"width": "8,8"}, "or 3 of them"), ({"layers": 0}, "layers must be"), ({"features": 0}, "features must be"),
    ({"qk_width": -1}, "qk_width must be"), ({"kernel": "linear"}, "signed"), ({"kernel": "sofmax"}, "no kernel"),
])
def test_numbers_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        PathNetworkConfig(**{"features": 6} | change)


def test_inputs_of_another_shape_are_refused():
    for shape in ((4, 5, 6), (4, 6), (0, 6, 5)):
        with pytest.raises(ValueError, match="inputs must have the shape"):
            make()(torch.zeros(shape).double())


# ------------------------------------------------------------------------- the task

def test_every_batch_is_a_function_of_seed_epoch_and_number():
    one, again, other = task(), task(), task(dataclasses.replace(SETTINGS, seed=1))
    batches = [batch for epoch in (0, 1) for batch in one.batches(epoch)]
    assert [len(batch) for batch in batches] == [8, 8, 4, 8, 8, 4] and sum(batches, []) == list(range(40))
    drawn = [one.batch(batch[0])[1] for batch in batches]
    for batch, found in reversed(list(zip(batches, drawn, strict=True))):       # whatever was drawn before
        begin, same = again.batch(batch[-1])
        assert begin == batch[0] and torch.equal(same.tokens, found.tokens) and torch.equal(same.labels, found.labels)
        assert not torch.equal(other.batch(batch[0])[1].choice, found.choice)
    assert all(not torch.equal(a.choice, b.choice) for a, b in itertools.combinations(drawn, 2) if len(a) == len(b))
    assert [torch.equal(getattr(one.valid, part), getattr(other.valid, part)) for part in ("choice", "labels")] \
        == [True, True]


def test_the_loss_of_parts_of_a_batch_is_that_of_the_whole():
    one, network = task(), make(features=192).float()
    batch = one.batches(1)[1]
    found = one.batch(batch[0])[1]
    loss, count = one.loss(network, batch, torch.device("cpu"))
    assert count == 8 and loss.item() == pytest.approx(((network(found.tokens) - found.labels) ** 2).mean().item())
    parts = [one.loss(network, batch[i::3], torch.device("cpu")) for i in range(3)]
    assert sum(value.item() * n for value, n in parts) / 8 == pytest.approx(loss.item())


def test_no_class_of_a_held_out_episode_is_trained_on():
    one = task()
    turns = ("", "@90", "@180", "@270")
    assert set(one._images.names) == {f"{digit}{turn}" for digit in "456789" for turn in turns}
    assert task(rotations=False)._images.names == list("456789")
    names = {split: DIGITS.splits[split].names for split in ("valid", "test")}
    assert names == {"valid": ["2", "3"], "test": ["0", "1"]}
    for split in ("valid", "test"):
        found = one.held_out(split, "")
        assert torch.equal(found.tokens, one.held_out(split, "").tokens) and len(found) == SIZES[f"{split}_episodes"]
        assert int(found.choice.max()) < len(DIGITS.splits[split])


def test_smaller_images_are_means_and_the_baselines_see_all():
    one, small = task(), task(size=16)
    assert small.valid.tokens.shape == (12, 192, 12) and one.valid.tokens.shape == (12, 192, 48)
    assert torch.equal(small.valid.choice, one.valid.choice) and small.baselines("valid") == one.baselines("valid")
    block = one._images.pixels[7, 2:4, 6:8]
    assert small._images.pixels[7, 1, 3].item() == pytest.approx(block.mean().item())
    assert small._count == 32


class Oracle(torch.nn.Module):
    """Answers some episodes right and the others wrong: it knows them by their tokens."""

    def __init__(self, found, wrong):
        super().__init__()
        self.known = {x.numpy().tobytes(): float(y) * (-0.5 if i < wrong else 0.5)
                      for i, (x, y) in enumerate(zip(found.tokens, found.labels, strict=True))}

    def forward(self, tokens):
        return torch.tensor([self.known[x.numpy().tobytes()] for x in tokens])


def test_metrics_and_baselines():
    one = task(test_episodes=300)
    found = one.held_out("test", "")
    told = []
    outcome = one.evaluate(Oracle(found, 30), torch.device("cpu"), lambda *done: told.append(done))
    assert outcome.metrics == {"test_accuracy": 0.9, "test_loss": pytest.approx(0.9 * 0.25 + 0.1 * 2.25)}
    assert told == [(256, 300), (300, 300)]
    assert set(outcome.baselines) == {"nearest_pixels", "nearest_patches", "nearest_moved"}
    right = (nearest(DIGITS.test, found, "pixels") == found.labels).double().mean().item()
    assert outcome.baselines["nearest_pixels"] == pytest.approx(right) and 0.85 < right < 1
    assert one.validate(Oracle(one.valid, 3), torch.device("cpu")) == {
        "valid_accuracy": 0.75, "valid_loss": pytest.approx(0.75 * 0.25 + 0.25 * 2.25)}
    for sample, i in zip(outcome.samples, (50, 150, 250), strict=True):
        classes = [DIGITS.test.names[int(DIGITS.test.classes[j])] for j in found.choice[i]]
        shots = dict(part.split(": ") for part in sample["shots"].split(", "))
        assert sample["query"] == classes[2] and shots[sample["query"]] == sample["answer"] and set(shots) == {"0", "1"}
        assert sample["model"].startswith(sample["answer"])                     # the first 30 only are wrong


def images(names, groups, differ=True, each=4, seed=0):
    pixels = torch.rand(each * len(names), 32, 32, generator=torch.Generator().manual_seed(seed))
    return data.Images(pixels, torch.arange(len(names)).repeat_interleave(each), names, groups, differ)


def characters():
    """Noise in the form of Omniglot."""
    parts = {"train": "abcdef", "valid": "ghij", "test": "klmn"}
    splits = {split: images([f"{'ABABAB'[i]}/{n}" for i, n in enumerate(names)], list("ABABAB"[:len(names)]))
              for split, names in parts.items()}
    return data.ImageCorpus("omniglot", **splits, runs=images(["1/a", "1/b", "2/a", "2/b"], list("1122"), False, 2),
                            origin="directory", fingerprint="f" * 64, licence="MIT")


def test_a_model_of_omniglot_is_tested_on_more():
    one, network = task(corpus=characters()), make(features=192).float()
    assert one.kinds("test") == ["within_groups", "runs", "digits"]
    assert one.kinds("valid") == ["within_groups", "digits"]
    assert task().kinds("test") == task().kinds("valid") == []
    outcome = one.evaluate(network, torch.device("cpu"), lambda done, of: None)
    assert list(outcome.metrics) == ["test_accuracy", "test_loss", "test_within_groups_accuracy", "test_runs_accuracy",
                                     "test_digits_accuracy"]
    groups = one.corpus.test.groups
    assert all(len({groups[c] for c in row}) == 1
               for row in one.corpus.test.classes[one.held_out("test", "within_groups").choice].tolist())
    names = one.corpus.runs.names
    assert all(len({names[c][0] for c in row}) == 1
               for row in one.corpus.runs.classes[one.held_out("test", "runs").choice].tolist())
    assert set(DIGITS.test.names) == {"0", "1"} and int(one.held_out("test", "digits").choice.max()) >= 100


def test_what_a_run_is_told_apart_by():
    known = task().data
    assert known["images"] == DIGITS.fingerprint and "stands_in_for" not in known
    assert known["classes"] == {"train": 6, "valid": 2, "test": 2}
    for change in ({"size": 16}, {"rotations": False}, {"epoch_episodes": 30}, {"test_episodes": 10}):
        assert task(**change).data["fingerprint"] != known["fingerprint"]
    assert task(corpus=dataclasses.replace(DIGITS, stands_in_for="omniglot")).data["stands_in_for"] == "omniglot"
    assert prepare(None, None, PRESETS["smoke"]).data["stands_in_for"] == "omniglot"


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: task(epoch_episodes=0), ValueError, "epoch_episodes must be at least 1"),
    (lambda: task(test_episodes=0), ValueError, "test_episodes must be at least 1"),
    (lambda: task(size=12), ValueError, "size must be a multiple of 8 that divides 32"),
    (lambda: task(size=64), ValueError, "size must be"), (lambda: task(size=0), ValueError, "size must be"),
    (lambda: task(Settings(batch_tokens=47)), ValueError, "one episode has 48 tokens"),
    (lambda: prepare("mnist", None, PRESETS["smoke"]), data.DataError, "no corpus called 'mnist'"),
    (lambda: prepare("omniglot", None, PRESETS["smoke"]), data.DataError, "omniglot is not on this machine"),
    (lambda: prepare(None, Path("nowhere"), PRESETS["smoke"]), data.DataError, "nowhere"),
])
def test_a_mistake_is_told_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("args", "words"), [
    (["--model", "heads=4,2,1"], "heads must be a whole number"),
    (["--model", "heads=4.5"], "heads takes a whole number"),
    (["--model", "features=9"], "features is given by the task"),
    (["--model", "vocabulary=9"], "no number of the model called 'vocabulary'"),
    (["--kernel", "linear"], "normalised by 'sum'"), (["--kernel", "sofmax"], "no kernel is called 'sofmax'"),
    (["--data", "bible"], "bible"), (["--option", "shots=2"], "no option called 'shots'"),
])
def test_the_command_refuses_a_mistake(kernelbook, args, words):
    code, _, said = kernelbook("train", "one-shot", "--preset", "smoke", "--accelerator", "cpu", *args)
    assert code == 1 and words in said and "Traceback" not in said and not os.listdir(".")


# ------------------------------------------------------------------------- runs

QUICK = {"preset": "smoke", "settings": {"steps": 9, "validate_every": 4}, "options": {"epoch_episodes": 64}}


def test_an_interrupted_run_ends_with_the_weights_it_would_have_had(tmp_path):
    whole, folder = tasks.train("one-shot", **QUICK, out=tmp_path / "whole")
    assert whole.name == "one-shot-digits-edp-smoke-epoch_episodes64-steps9-validate_every4-seed0"
    assert whole.data["stands_in_for"] == "omniglot" and whole.config["model"]["heads"] == 2

    def stop(event):
        if event.get("step") == 6:                  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(tasks.run.Interrupted, match="after step 6 of 9"):
        tasks.train("one-shot", **QUICK, out=tmp_path / "parts", report=stop)
    with pytest.raises(FileError, match="another run"):
        tasks.train("one-shot", **QUICK | {"options": {"epoch_episodes": 48}}, out=tmp_path / "parts", resume=True)
    parts, again = tasks.train("one-shot", **QUICK, out=tmp_path / "parts", resume=True)
    assert parts.history == whole.history and parts.metrics == whole.metrics and parts.baselines == whole.baselines
    a, b = (load_tensors(where / "model.safetensors")[0] for where in (folder, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    other, _ = tasks.train("one-shot", **QUICK, seed=1, out=tmp_path / "other")
    assert other.history != whole.history and other.data == whole.data


def test_a_stored_network_is_found_again(tmp_path):
    network = PathNetworkConfig(6, heads="2,1", width=4, qk_width=2, kernel="rbf").build()
    save_model(tmp_path / "model.safetensors", network, {"task": "one-shot"})
    again, metadata = load_model(tmp_path)
    assert isinstance(again, PathNetwork) and again.config == network.config and metadata["class"] == "PathNetwork"
    assert torch.equal(again(sequences().float()), network(sequences().float())) and not again.training


def test_a_file_of_another_class_is_refused_in_words(kernelbook, tmp_path):
    small = TransformerConfig("decoder", vocabulary=8, width=8, heads=2, layers=1, feedforward=8).build()
    run = {"task": "one-shot", "run": {"settings": {}, "options": PRESETS["smoke"].options, "corpus": "digits"}}
    save_model(tmp_path / "model.safetensors", small, run)
    code, _, said = kernelbook("evaluate", tmp_path)
    assert code == 1 and "holds a Transformer, and no model of one-shot" in said
    tensors, metadata = load_tensors(tmp_path / "model.safetensors")
    for name, words in (("PathNetwork", "configuration in .* cannot be read"), ("os.system", "does not know"),
                        (["Transformer"], "does not know")):
        save_tensors(tmp_path / "model.safetensors", tensors, metadata | {"class": name})
        with pytest.raises(FileError, match=words):
            load_model(tmp_path)
    network = PathNetworkConfig(6, width=4, qk_width=2).build()
    save_model(tmp_path / "model.safetensors", network, {"task": "recall", "run": run["run"] | {"corpus": "synthetic"}})
    assert "holds a PathNetwork, and no model of recall" in kernelbook("evaluate", tmp_path)[2]


def test_the_suite_compares_kernels_whose_attention_the_theory_takes():
    from kernelbook.experiments import SUITES, plan

    runs = plan("one-shot", "laptop")
    assert len(runs) == 5 * len(SUITES["one-shot"].variants) and {run.corpus for run in runs} == {"digits"}
    for run in runs[:3]:
        network = PathNetworkConfig(6, width=4, qk_width=2, kernel=run.kernel, normaliser=run.normaliser).build()
        path_inputs(sequences().float(), network.attention(sequences().float()), network.readout(sequences().float()))


def test_a_record_is_compared_like_any_other(tmp_path):
    record, _ = tasks.train("one-shot", preset="smoke", settings={"steps": 1}, out=tmp_path / "a",
                            model={"heads": "3,2", "width": "4,8,8"})
    listed = record.name.removeprefix("one-shot-digits-edp-").removesuffix("-smoke-steps1-seed0")
    assert len(listed) == 8 and int(listed, 16)             # a word with commas cannot stand in the name of a file
    assert record.config["model"]["heads"] == "3,2" and results.feature_dimension(record) == math.inf
    assert load_model(tmp_path / "a")[0].config.head_counts == (3, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_training_on_a_gpu(tmp_path):
    here, _ = tasks.train("one-shot", **QUICK, out=tmp_path / "cpu")
    there, _ = tasks.train("one-shot", **QUICK, accelerator="cuda", out=tmp_path / "gpu")
    assert there.metrics["valid_loss"] == pytest.approx(here.metrics["valid_loss"], rel=1e-3)
