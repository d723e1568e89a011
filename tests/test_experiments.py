"""Experiments: a plan is a list, and what runs it makes each run once, whatever happens on the way."""

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelbook import cli, experiments, features, kernels, results
from kernelbook.attention import weights
from kernelbook.data import DataError
from kernelbook.experiments import SUITES, Run, Suite, Variant, chosen, execute, plan, state
from kernelbook.files import FileError
from kernelbook.models import TransformerConfig
from kernelbook.tasks import TASKS, run_name

PRESETS = ("smoke", "quick", "laptop", "gpu")


@pytest.fixture(autouse=True)
def no_corpora(monkeypatch):
    """Plans do not depend on what lies on this machine."""
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)


# ------------------------------------------------------------------------- plans

@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES.keys())
def test_a_plan_is_a_list_of_different_runs_that_never_changes(suite):
    for preset in PRESETS:
        runs = plan(suite, preset, seeds=3)
        assert [run.name for run in runs] == [run.name for run in plan(suite.name, preset, seeds=3)]
        assert len({run.name for run in runs}) == len(runs) == 3 * len(suite.tasks) * len(suite.variants)
        assert plan(suite, preset, seeds=2) == runs[:len(runs) * 2 // 3]            # further seeds come after
        assert {run.accelerator for run in runs} == {"cuda" if preset == "gpu" else "cpu"}
    assert suite.variant(suite.reference).label == suite.reference
    assert len({v.label for v in suite.variants}) == len(suite.variants) and all(v.why for v in suite.variants)


def test_what_suites_have_in_common_is_one_run():
    suites = [suite for suite in SUITES.values() if "recall" in suite.tasks]
    names = [{run.name for run in plan(suite, "quick", seeds=1)} for suite in suites]
    edp = run_name("recall", "synthetic", "edp", "quick", 0)
    assert len(names) == 3 and all(edp in one for one in names)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_printed_command_makes_the_run_of_that_name(suite, preset):
    for run in plan(suite, preset, seeds=1):
        words = run.command
        given = {flag: [words[i + 1] for i, word in enumerate(words) if word == flag]
                 for flag in ("--kernel-option", "--model", "--setting", "--option")}
        kernel = cli._kernel(words[words.index("--kernel") + 1], given["--kernel-option"])
        model, settings, options = (cli._pairs(flag, given[flag]) for flag in ("--model", "--setting", "--option"))
        normaliser = words[words.index("--normaliser") + 1] if "--normaliser" in words else "sum"
        assert run.name == run_name(run.task, run.corpus or "synthetic", kernel, preset, 0, normaliser=normaliser,
                                    model=model, settings=settings, options=options)
        size = TASKS[run.task].presets[preset].of(run.corpus)
        kind = TASKS[run.task]
        kind.config(**kind.stand_in, kernel=kernel, normaliser=normaliser, **size.model | model)        # it fits


RESULTS = Path(__file__).parent.parent / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("suite-*.json")), ids=lambda path: path.stem)
def test_the_results_that_are_kept_are_those_of_the_plans(path, monkeypatch):
    monkeypatch.setattr("kernelbook.data.info", lambda name: SimpleNamespace(available=True))
    about = json.loads(path.read_text())
    kept = results.load_suite(about["name"], about["preset"], folder=path.parent)
    data, names = {}, {}
    for group in kept.groups:
        if group.corpus is not None:
            data.setdefault(group.task, []).append(group.corpus)
        names |= {name: group for many in group.names.values() for name in many}
    seeds = max(len(many) for group in kept.groups for many in group.names.values())
    planned = {run.name: run for run in plan(kept.name, kept.preset, data=data, seeds=seeds)}
    assert set(names) <= set(planned)
    for name in kept.records:                   # made with the settings that the presets have today
        assert state(planned[name], out=RESULTS) in ("done", "diverged")


@given(st.integers(1, 40), st.integers(1, 50))
def test_shards_are_parts_of_the_plan(parts, count):
    runs = [Run("recall", None, "EDP", "smoke", seed, kernels.EDP()) for seed in range(count)]
    shards = [chosen(runs, shard=(i, parts)) for i in range(1, parts + 1)]
    assert sorted(run.name for shard in shards for run in shard) == sorted(run.name for run in runs)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def test_runs_are_chosen_by_a_pattern():
    runs = plan("dimension", "smoke", seeds=2)
    assert {run.variant for run in chosen(runs, only="taylor-degree4")} == {"Taylor 4"}
    assert {(run.task, run.seed) for run in chosen(runs, only="recall*seed1")} == {("recall", 1)}
    with pytest.raises(ValueError, match="no run's name holds 'rbf'"):
        chosen(runs, only="rbf")


def test_corpora_are_those_that_were_named_else_what_is_here(tmp_path, monkeypatch):
    assert {r.corpus for r in plan("five-kernels", "smoke", seeds=1) if r.task == "translation"} == {"bible"}
    with pytest.raises(DataError, match="multi30k is not here.*KERNELBOOK_DATA"):
        plan("five-kernels", "smoke", data={"translation": ["multi30k"]})
    with pytest.raises(DataError, match="no corpus called 'multi31k'"):
        plan("five-kernels", "smoke", data={"translation": ["multi31k"]})
    with pytest.raises(ValueError, match="bible is a corpus for translation, not for classification"):
        plan("five-kernels", "smoke", data={"classification": ["bible"]})
    monkeypatch.setenv("KERNELBOOK_DATA", str(tmp_path))
    (tmp_path / "multi30k").mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("de", "en"):
            (tmp_path / "multi30k" / f"{split}.{language}").write_text("a\n")
    assert {r.corpus for r in plan("five-kernels", "smoke", seeds=1) if r.task == "translation"} == {"multi30k"}
    named = plan("five-kernels", "smoke", data={"translation": ["bible", "multi30k"]}, seeds=1)
    assert {r.corpus for r in named if r.task == "translation"} == {"bible", "multi30k"}


@pytest.mark.parametrize(("call", "words"), [
    (lambda: plan("six-kernels"), "no suite is called 'six-kernels' \\(known: five-kernels"),
    (lambda: plan("controls", "fast"), "no preset of translation is called 'fast'"),
    (lambda: plan("controls", "smoke", seeds=0), "seeds must be at least 1"),
    (lambda: plan("controls", "smoke", data={"poetry": ["bible"]}), "has no task poetry"),
    (lambda: plan("controls", "smoke", data={"recall": ["bible"]}), "reads no corpus: leave out recall=bible"),
    (lambda: chosen([], shard=(9, 8)), "a shard is I/N with I from 1 to N"),
    (lambda: execute([], jobs=0), "jobs must be at least 1"),
    (lambda: experiments.temperature_matched("quadratic", 8), "row normalisation cancels"),
])
def test_a_mistake_is_told_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------- what the variants are

def test_the_control_without_key_bias_is_edp_by_the_gauge_theorem():
    # checks: thm-gauge, cor-rbf
    @dataclasses.dataclass(frozen=True, repr=False)
    class NoKeyBias(kernels.RBF):
        def log_gram(self, q, k):
            return super().log_gram(q, k) + (k.square().sum(-1) * self.precision(k.shape[-1]) / 2)[..., None, :]

    q, k = (torch.randn(64, 16, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    assert (weights(q, k, NoKeyBias()) - weights(q, k, "edp")).abs().max() < 1e-12
    assert (weights(q, k, "rbf") - weights(q, k, "edp")).abs().max() > 0.01        # the bias does something


@pytest.mark.parametrize("name", ["l2", "quadratic"])
def test_a_homogeneous_kernel_has_no_temperature(name):
    q, k = (torch.randn(8, 16, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    assert (weights(q, k, kernels.get(name, scale=7.0)) - weights(q, k, name)).abs().max() < 1e-12
    assert (weights(q, k, kernels.EDP(scale=7.0)) - weights(q, k, "edp")).abs().max() > 0.1


def test_temperatures_are_matched():
    for d in (8, 32):
        wanted = experiments.mean_entropy(kernels.EDP(), d)
        for name, apart in (("rbf", 0.02), ("exponentiated_intersection", 0.2)):
            found = experiments.temperature_matched(name, d)
            assert abs(experiments.mean_entropy(kernels.get(name, **found), d) - wanted) < 1e-3
            assert abs(experiments.mean_entropy(kernels.get(name), d) - wanted) > apart         # and were not
    # By the definition of entropy, once.
    w = weights(torch.zeros(1, 4, dtype=torch.float64), torch.zeros(32, 4, dtype=torch.float64))
    assert math.isclose(torch.special.entr(w).sum().item(), math.log(32))


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_of_parameters_are_matched(preset):
    runs = {(run.task, run.variant): run for run in plan("controls", preset, seeds=1)}
    for task in SUITES["controls"].tasks:
        def count(label, task=task):
            run = runs[task, label]
            return experiments.parameter_count(TransformerConfig(
                experiments.ARCHITECTURES[task], 8, **TASKS[task].presets[preset].of(run.corpus).model | run.model))

        for label in ("EDP, tied", "EDP, width 8"):
            if runs[task, label].model.get("qk_width") != 8 or count(label) != count("EDP"):
                assert count(label) < count("EDP")
            # One unit more in each feed-forward sublayer is the least there is.
            wide = TASKS[task].presets[preset].of(runs[task, label].corpus).model
            sublayers = (2 if task == "translation" else 1) * wide["layers"]
            assert abs(count(f"{label}, matched") - count("EDP")) <= sublayers * (2 * wide["width"] + 1) / 2


def test_the_dimension_suite_varies_the_dimension():
    found = {v.label: kernels.get(v.kernel, **v.options) for v in SUITES["dimension"].variants}
    d = 32
    dimension = {label: kernel.feature_dimension(d) for label, kernel in found.items()}
    assert dimension | {"EDP": 0} == dimension | {
        "EDP": 0, "Taylor 2": 561, "Taylor 4": math.comb(36, 4), "Taylor 6": math.comb(38, 6),
        "random features 16": 16, "random features 64": 64, "random features 128": 128, "elu + 1": 32,
        "EDP, width 1": math.inf, "EDP, width 8": math.inf} and dimension["EDP"] == math.inf
    assert all(kernel.normalisable and kernel.range.low >= 0 for kernel in found.values())      # all are positive
    assert isinstance(found["elu + 1"], features.FeatureKernel)


# ------------------------------------------------------------------------- making runs

FAKE = '''
"""Stands for kernelbook: does what the file named after its run says, and leaves what a run leaves."""
import json, os, signal, sys, time
words = sys.argv[1:]
folder = words[words.index("--out") + 1]
name = os.path.basename(folder)
plan = json.load(open(os.path.join(os.path.dirname(__file__), "plan.json")))
what = plan.get(name, "finish")
with open(os.path.join(os.path.dirname(__file__), "calls.txt"), "a") as file:
    file.write(json.dumps([name, "--resume" in words, os.environ["OMP_NUM_THREADS"], os.getpid()]) + "\\n")
state = os.path.join(folder, "state.safetensors")
print("log of", name, flush=True)
if what == "diverge":
    print("error: the loss became nan in step 3 of 20", file=sys.stderr)
    sys.exit(3)
if what == "fail":
    open(state, "w").close()
    print("error: the disk is on fire", file=sys.stderr)
    sys.exit(1)
if what == "wait" and "--resume" not in words:
    def stop(*_):
        open(state, "w").close()
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    open(os.path.join(folder, "ready"), "w").close()
    time.sleep(30)
record = plan["record"] | {"name": plan.get("as", name), "seed": int(name[-1])}
json.dump(record, open(os.path.join(folder, "record.json"), "w"))
open(os.path.join(folder, "model.safetensors"), "w").close()
if os.path.exists(state):
    os.unlink(state)
'''

RECORD = results.Record(
    name="", task="translation", preset="smoke", seed=0, kernel={"kernel": "edp"},
    metrics={"test_bleu": 1.0, "valid_loss": 2.0}, baselines={}, signature="", config={"model": {}, "settings": {}},
    data={"name": "bible", "corpus": "bible", "origin": "directory"}, parameters=3,
    history=[{"epoch": 1, "step": 20, "valid_loss": 1.23456789}], samples=[{"source": "not ours"}],
    provenance={"command": "/home" "/me/kernelbook train --out /tmp/x", "wall_time_s": 1.0, "device": "cpu"})


@pytest.fixture
def fake(tmp_path):
    """Three runs; a function that makes them by a program that only pretends to, given what each is to do."""
    runs = [Run("translation", "bible", "EDP", "smoke", seed, kernels.EDP()) for seed in range(3)]
    (tmp_path / "fake.py").write_text(FAKE)

    def go(*what, some=runs, report=lambda event: None, **options):
        behaviour = {run.name: w for run, w in zip(some, what, strict=False)} | options.pop("more", {})
        (tmp_path / "plan.json").write_text(json.dumps(behaviour | {"record": dataclasses.asdict(RECORD)}))
        before = len(calls())
        summary = execute(some, runs_folder=tmp_path / "runs", out=tmp_path / "results", report=report,
                          command=[sys.executable, str(tmp_path / "fake.py")], **options)
        return summary, calls()[before:]

    def calls():
        path = tmp_path / "calls.txt"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    go.runs, go.folder = runs, tmp_path
    return go


def left(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_runs_are_made_once_and_their_records_kept(fake):
    events = []
    summary, calls = fake(report=events.append, jobs=2)
    assert summary.finished and sorted(r.name for r in summary.finished) == [r.name for r in fake.runs]
    assert len(calls) == 3 and {threads for *_, threads, _ in calls} == {str(max(1, experiments._cores() // 2))}
    assert left(fake.folder / "results") == [f"smoke/{run.name}.json" for run in fake.runs]
    assert left(fake.folder / "runs") == [".locks"]
    kept = results.load(fake.folder / "results" / "smoke" / f"{fake.runs[0].name}.json")
    assert kept.samples == [] and kept.history[0]["valid_loss"] == 1.2346       # not ours to pass on; small
    assert kept.provenance["command"] == fake.runs[0].shown                     # no folder of this machine
    ends = [e for e in events if "end" in e]
    assert [e["done"] for e in ends] == [1, 2, 3] and ends[-1]["left"] == 0 < ends[0]["left"]
    assert ends[0]["value"] == 1.0 and {e["outcome"] for e in ends} == {"finished"}

    summary, calls = fake()
    assert calls == [] and len(summary.skipped) == 3 and not summary.finished


def test_models_are_kept_if_asked_for(fake):
    fake(keep_models=True)
    assert (fake.folder / "runs" / fake.runs[0].name / "model.safetensors").exists()
    assert fake()[1] == []


def test_a_run_that_diverges_is_a_result(fake):
    summary, _ = fake("diverge")
    assert [run.seed for run in summary.diverged] == [0] and len(summary.finished) == 2 and not summary.failed
    path = fake.folder / "results" / "smoke" / f"{fake.runs[0].name}.json"
    found = results.read(path)
    assert isinstance(found, results.FailedRun) and found.error == "the loss became nan in step 3 of 20"
    assert found.command == fake.runs[0].shown and found.provenance["versions"]
    assert found.provenance["threads"] == max(1, experiments._cores() // 2)
    assert json.loads(path.read_text())["kind"] == "failed run"
    with pytest.raises(FileError, match="says that the run .* failed: the loss became nan"):
        results.load(path)
    assert fake()[1] == [] and state(fake.runs[0], out=fake.folder / "results") == "diverged"


def test_any_other_failure_is_told_and_tried_again(fake):
    summary, calls = fake("finish", "fail", "finish")
    assert len(calls) == 3 and [run.seed for run, _ in summary.failed] == [1]
    assert "ended with code 1" in summary.failed[0][1] and "error: the disk is on fire" in summary.failed[0][1]
    assert len(left(fake.folder / "results")) == 2
    summary, calls = fake()
    assert [(name[-1], resumed) for name, resumed, *_ in calls] == [("1", True)] and len(summary.finished) == 1


def test_a_damaged_record_is_named_and_the_others_go_on(fake):
    fake()
    path = fake.folder / "results" / "smoke" / f"{fake.runs[1].name}.json"
    whole = path.read_text()
    for damage, words in ((whole[:100], "delete it and"), (whole.replace("seed1", "seed7"), "holds the record of"),
                          (whole.replace('"settings": {}', '"settings": {"steps": 21}'), "'steps': (21, 20)")):
        path.write_text(damage)
        summary, calls = fake()
        assert calls == [] and len(summary.skipped) == 2
        (run, why), = summary.failed
        assert run.seed == 1 and str(path) in why and words in why and "delete" in why
    path.unlink()
    assert len(fake()[0].finished) == 1


def test_a_run_of_another_name_is_not_kept(fake):
    summary, _ = fake(some=fake.runs[:1], more={"as": "translation-of-something-else-seed0"})
    assert "holds the record of translation-of-something-else-seed0" in summary.failed[0][1]
    assert left(fake.folder / "results") == []


def test_a_record_that_was_not_yet_copied_is_kept_without_training_again(fake):
    fake(keep_models=True)
    (fake.folder / "results" / "smoke" / f"{fake.runs[2].name}.json").unlink()
    summary, calls = fake()
    assert calls == [] and [run.seed for run in summary.finished] == [2]


def interrupted(fake, number=signal.SIGINT):
    def when_ready(event):
        if "start" in event:
            ready = fake.folder / "runs" / event["start"].name / "ready"
            for _ in range(500):
                if ready.exists():
                    break
                time.sleep(0.02)
            os.kill(os.getpid(), number)
    return when_ready


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_children_save_and_the_next_call_goes_on(fake, number):
    summary, calls = fake("wait", report=interrupted(fake, number), jobs=1)
    assert summary.stopped and len(calls) == 1 and not summary.failed
    assert state(fake.runs[0], out=fake.folder / "results", runs=fake.folder / "runs") == "interrupted"
    assert not list((fake.folder / "runs").glob("*.lock"))
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    summary, calls = fake("wait", jobs=1)
    assert [resumed for _, resumed, *_ in calls] == [True, False, False] and len(summary.finished) == 3


def test_two_processes_never_make_the_same_run(fake):
    (fake.folder / "runs").mkdir()
    lock = fake.folder / "runs" / f"{fake.runs[1].name}.lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pids": [os.getpid()]}))
    summary, calls = fake()
    assert len(calls) == 2 and [run.seed for run, _ in summary.elsewhere] == [1]
    assert f"process {os.getpid()} on" in summary.elsewhere[0][1] and lock.exists()

    for held in ({"host": "another", "pids": [1]}, "not a lock"):
        lock.write_text(json.dumps(held))
        summary, calls = fake()
        assert calls == [] and str(lock) in summary.elsewhere[0][1]         # which file to delete

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock.write_text(json.dumps({"host": socket.gethostname(), "pids": [gone.pid, os.getpid()]}))
    assert fake()[1] == []              # who began it was killed, but the run itself goes on
    lock.write_text(json.dumps({"host": socket.gethostname(), "pids": [gone.pid]}))
    summary, calls = fake()
    assert len(calls) == 1 and len(summary.finished) == 1 and not lock.exists()


def test_what_another_process_has_made_meanwhile_is_not_made_again(fake):
    def elsewhere(event):
        if "start" in event and event["start"].seed == 0:
            other = fake.runs[2]
            dataclasses.replace(RECORD, name=other.name, seed=2).save(
                fake.folder / "results" / "smoke" / f"{other.name}.json")

    summary, calls = fake(report=elsewhere, jobs=1)
    assert [name[-1] for name, *_ in calls] == ["0", "1"] and [run.seed for run in summary.skipped] == [2]
    assert not list((fake.folder / "runs").glob("*.lock"))


def test_a_lock_is_held_while_the_child_lives(fake):
    locks = []

    def look(event):
        if "start" in event:
            lock = fake.folder / "runs" / f"{event['start'].name}.lock"
            locks.append(json.loads(lock.read_text()))

    _, calls = fake(report=look, jobs=1)
    assert [lock["pids"] for lock in locks] == [[os.getpid(), pid] for *_, pid in calls]


def test_several_gpus_are_shared_out(fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    run = dataclasses.replace(fake.runs[0], accelerator="cuda")
    assert [experiments._environment(run, slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "6", "4"]
    assert experiments._environment(run, 0, 1)["CUDA_VISIBLE_DEVICES"] == "4,6"


# ------------------------------------------------------------------------- by the command line, for real

TINY = Suite("tiny", "Does it run?", (Variant("EDP", "the reference"), Variant("RBF", "another", "rbf")), "EDP",
             ("recall",))


@pytest.fixture
def tiny(monkeypatch):
    """A suite that takes seconds, by name."""
    monkeypatch.setitem(SUITES, "tiny", TINY)


def test_a_suite_from_the_command_to_the_figure(kernelbook, tiny, tmp_path):
    names = [f"recall-synthetic-{kernel}-smoke-seed0" for kernel in ("edp", "rbf")]
    code, said, _ = kernelbook("results", "run", "tiny", "--preset", "smoke", "--seeds", 1, "--list")
    assert code == 0 and "Does it run?" in said and "2 to do" in said and left(tmp_path) == []
    assert "kernelbook train recall --kernel rbf --preset smoke --seed 0 --accelerator cpu" in said

    code, said, told = kernelbook("results", "run", "tiny", "--preset", "smoke", "--seeds", 1)
    assert code == 0 and "2 finished" in said and all(name in told for name in names)
    assert left(tmp_path) == ["results/smoke/" + f for f in (*(f"{name}.json" for name in names),
                                                             "suite-tiny-smoke.json")] + ["runs/.locks"]
    record = results.load(f"results/smoke/{names[1]}.json")
    assert record.provenance["command"] == "kernelbook " + " ".join(
        ["train", "recall", "--kernel", "rbf", "--preset", "smoke", "--seed", "0", "--accelerator", "cpu"])

    code, said, _ = kernelbook("results", "run", "tiny", "--preset", "smoke", "--seeds", 1)
    assert code == 0 and "2 there already" in said
    code, said, _ = kernelbook("results", "missing", "tiny", "--preset", "smoke", "--seeds", 2)
    assert code == 0 and "recall-synthetic-edp-smoke-seed1\n" in said and "2 of 4 runs are missing" in said
    code, said, _ = kernelbook("results", "list")
    assert code == 0 and all(name in said for name in names)

    where = ("tiny", "--preset", "smoke", "--results", "results")
    code, said, _ = kernelbook("results", "table", *where)
    assert code == 0 and "recall: test accuracy" in said and "∞" in said and f"{record.parameters:,}" in said
    code, said, _ = kernelbook("results", "table", *where, "--markdown")
    assert code == 0 and "| RBF |" in said
    code, said, _ = kernelbook("results", "table", *where, "--csv")
    assert code == 0 and said.splitlines()[2].startswith("recall,,test_accuracy,RBF,")
    for more in ((), ("--curves", "valid_accuracy", "--dark")):
        code, said, _ = kernelbook("results", "plot", *where, "--out", "figure.png", *more)
        assert code == 0 and "EDP" in said and (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(("args", "words"), [
    (("run", "six"), "no suite is called 'six' (known: five-kernels"),
    (("run", "tiny", "--data", "recall"), "TASK=CORPUS"),
    (("run", "tiny", "--shard", "3"), "I/N"),
    (("run", "tiny", "--only", "edp2"), "no run's name holds 'edp2'"),
    (("table", "tiny"), "there are no results of the suite 'tiny' at the preset 'quick'"),
    (("table", "tiny", "--csv", "--markdown"), "not both"),
])
def test_a_mistake_on_the_command_line_is_told_in_words(kernelbook, tiny, args, words):
    code, _, said = kernelbook("results", *args)
    assert code == 1 and words in said
