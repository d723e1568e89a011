"""Runs of every task: their names, values instead of a preset's, and what becomes of mistakes."""

import dataclasses
import itertools
import json
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelbook import kernels, results, tasks
from kernelbook.data import DataError
from kernelbook.files import save_tensors
from kernelbook.models import TransformerConfig
from kernelbook.paths import PathNetworkConfig
from kernelbook.tasks.run import overrides
from kernelbook.training import OutOfMemory, Settings, load_model

RESULTS = Path(__file__).resolve().parent.parent / "results"
WORDS = "red old big wet new hot tall wild calm long".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each task with a corpus of a reader's own."""
    root, draw = tmp_path_factory.mktemp("own"), random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=4)) for _ in range(60)]
    for name in ("pairs-de-en", "prose", "labels"):
        (root / name).mkdir()
    for split, part in (("train", lines[:40]), ("valid", lines[40:50]), ("test", lines[50:])):
        (root / "pairs-de-en" / f"{split}.de").write_text("\n".join(part))
        (root / "pairs-de-en" / f"{split}.en").write_text("\n".join(line.upper() for line in part))
        (root / "prose" / f"{split}.txt").write_text("\n\n".join(part))
        (root / "labels" / f"{split}.tsv").write_text(
            "\n".join(f"{'good' if i % 2 else 'bad'}\t{line}" for i, line in enumerate(part)))
    return {"translation": root / "pairs-de-en", "language-modelling": root / "prose",
            "classification": root / "labels", "recall": None, "one-shot": None}


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory, request):
    """Folders of finished runs, one of each task, and their records."""
    root = tmp_path_factory.mktemp("trained")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)       # as the command's tests have it
    request.addfinalizer(monkeypatch.undo)
    return {task: (root / task, tasks.train(task, preset="smoke", data_dir=folder, settings={"steps": 2},
                                            out=root / task)[0]) for task, folder in folders.items()}


def train(folders, *more, task="translation"):
    return ("train", task, "--preset", "smoke", "--data-dir", folders[task], "--accelerator", "cpu", "--steps", 2,
            *more)


# ------------------------------------------------------------------------- names

def test_the_names_of_the_books_records_and_the_numbers_they_were_made_with_are_those_of_today():
    found = 0
    for path in RESULTS.glob("**/*.json"):
        record = json.loads(path.read_text("utf8"))
        if "task" not in record or "steps" in record["name"] or record["preset"] not in ("quick", "laptop"):
            continue
        if record["task"] != "translation":
            continue
        corpus = record["data"]["name"].partition(" (")[0]
        preset = tasks.TASKS["translation"].presets[record["preset"]].of(corpus)
        name = tasks.run_name("translation", corpus, kernels.from_config(record["kernel"]), record["preset"],
                              record["seed"])
        if name != record["name"]:
            continue                    # a run with values of its own
        found += 1
        today = dataclasses.asdict(dataclasses.replace(preset.settings, seed=record["seed"]))
        assert {k: today[k] for k in record["config"]["settings"]} == record["config"]["settings"], path
        assert preset.model.items() <= record["config"]["model"].items(), path
    assert found >= 3


VALUES = {
    "model": st.fixed_dictionaries({}, optional={
        "width": st.sampled_from((32, 64, 128)), "tied": st.booleans(), "dropout": st.sampled_from((0, 0.1, 0.25)),
        "qk_width": st.sampled_from((None, 8, 16)), "path": st.sampled_from(("auto", "tiled"))}),
    "settings": st.fixed_dictionaries({}, optional={
        "steps": st.sampled_from((100, 1000)), "clip": st.sampled_from((1, 1.0, 2.5)), "learning_rate":
        st.sampled_from((1e-5, 3e-3)), "schedule": st.sampled_from(("linear", "inverse-sqrt")), "validate_every":
        st.sampled_from((None, 5))}),
    "kernel": st.sampled_from((("rbf", {}), ("rbf", {"bandwidth": 1}), ("rbf", {"bandwidth": 2}),
                               ("rbf", {"bandwidth": 2.0}), ("taylor", {"degree": 4}), ("edp", {}))),
    "seed": st.sampled_from((0, 10)), "normaliser": st.sampled_from(("sum", "abs-sum")),
    "precision": st.sampled_from(("32-true", "bf16-mixed")),
}


def named(run):
    run = dict(run)
    name, options = run.pop("kernel")
    return tasks.run_name("translation", "multi30k", kernels.get(name, **options), "quick", run.pop("seed"), **run)


def meant(run):
    """The run with every value spelled out."""
    preset = tasks.TASKS["translation"].presets["quick"]
    name, options = run["kernel"]
    usual = {"tied": False, "dropout": 0.1, "qk_width": None, "path": "auto"} | preset.model
    return run | {"model": usual | run["model"], "settings": dataclasses.asdict(preset.settings) | run["settings"],
                  "kernel": kernels.get(name, **options)}


@settings(max_examples=60)
@given(st.fixed_dictionaries(VALUES), st.fixed_dictionaries(VALUES), st.sampled_from(list(VALUES)))
def test_equal_names_are_equal_runs(a, b, part):
    near = a | {part: b[part]}
    assert (named(a) == named(b)) == (meant(a) == meant(b))
    assert (named(a) == named(near)) == (meant(a) == meant(near))
    spelled_out = {key: value for key, value in reversed(meant(a)["model"].items()) if key in a["model"]}
    assert named(a) == named(a | {"model": spelled_out})
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,200}", named(a))


def test_names_of_values_that_cannot_stand_in_a_file_name():
    base = {"task": "translation", "preset": "quick", "seed": 0}
    rbf, edp = kernels.get("rbf"), kernels.get("edp")
    wide = kernels.get("rbf", bandwidth=2.0)
    names = [tasks.run_name(corpus=corpus, kernel=kernel, **base) for corpus, kernel in (
        ("mine", rbf + edp), ("mine", wide + edp), ("mine", rbf * edp), ("mine", edp + rbf), ("a/b", edp), ("a_b", edp),
        ("a b", edp), ("Größe", edp), ("x" * 300, edp), ("x" * 301, edp))]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) for name in names)
    assert tasks.run_name(corpus="mine", kernel=kernels.get("rbf", bandwidth=2) + edp, **base) == names[1]
    assert tasks.run_name(corpus="m", kernel="rbf", settings={"accumulate": 4, "save_every": 1}, **base) \
        == tasks.run_name(corpus="m", kernel="rbf", **base)


def test_no_name_of_a_value_begins_with_that_of_another():
    """Else name and value could be read in two ways."""
    groups = [Settings, TransformerConfig, PathNetworkConfig,
              *{type(kernels.get(name)) for name in kernels.available()}]
    groups = [[f.name for f in dataclasses.fields(g)] for g in groups]
    groups += [list(tasks.run._option_types(kind)) for kind in tasks.TASKS.values()]
    for names in groups:
        assert not [(a, b) for a, b in itertools.permutations(names, 2) if b.startswith(a)]


def test_a_preset_has_numbers_for_a_corpus_and_overrides_reach_them():
    laptop = tasks.TASKS["translation"].presets["laptop"]
    assert laptop.of("multi30k") is laptop and laptop.of(None) is laptop
    assert laptop.of("bible").options["max_words"] == 24 and laptop.of("bible").options["beam"] == 1
    changed = laptop.changed(settings={"steps": 7}, model={"width": 60}, options={"beam": 2})
    assert {(p.settings.steps, p.model["width"], p.options["beam"]) for p in (changed, changed.of("bible"))} \
        == {(7, 60, 2)}
    assert laptop.settings.steps != 7 and changed.of("bible").model["layers"] == laptop.of("bible").model["layers"]
    name = tasks.run_name("translation", "bible", "edp", "laptop", 0, options={"max_words": 24},
                          settings={"steps": 1800})
    assert name == "translation-bible-edp-laptop-seed0"


# ------------------------------------------------------------------------- values instead of a preset's

def test_values_get_the_type_of_their_field():
    kind = tasks.TASKS["translation"]
    own = overrides(kind, model={"dropout": 0, "qk_width": "None"}, settings={"steps": 1e4, "validate_every": None},
                    options={"max_words": 5})
    assert own == {"model": {"dropout": 0.0, "qk_width": None}, "settings": {"steps": 10000, "validate_every": None},
                   "options": {"max_words": 5}}
    assert type(own["settings"]["steps"]) is int and type(own["model"]["dropout"]) is float


@pytest.mark.parametrize(("task", "args", "words"), [
    ("translation", ["--model", "widht=8"], ["no number of the model called 'widht'", "mean 'width'", "layers"]),
    ("translation", ["--setting", "speed=8"], ["no setting called 'speed'", "learning_rate", "batch_tokens"]),
    ("recall", ["--option", "max_words=8"], ["no option called 'max_words'", "pairs", "keys"]),
    ("translation", ["--model", "width=2.5"], ["width takes a whole number, not 2.5"]),
    ("translation", ["--model", "tied=1"], ["tied takes true or false, not 1"]),
    ("translation", ["--setting", "steps=true"], ["steps takes a whole number, not True"]),
    ("translation", ["--setting", "learning_rate=fast"], ["learning_rate takes a number, not 'fast'"]),
    ("translation", ["--setting", "learning_rate"], ["takes name=value", "learning_rate=0.001"]),
    ("translation", ["--model", "width=8", "--model", "width=16"], ["width=... was given twice"]),
    ("translation", ["--setting", "seed=1"], ["seed is given by --seed"]),
    ("translation", ["--model", "kernel=rbf"], ["kernel is given by --kernel"]),
    ("translation", ["--model", "vocabulary=9"], ["vocabulary is given by the task"]),
    ("translation", ["--setting", "steps=4", "--steps", "4"], ["say the same thing"]),
    ("translation", ["--setting", "warmup=3"], ["warmup must be from 0 to 1"]),
    ("translation", ["--model", "heads=3"], ["multiple of heads"]),
    ("translation", ["--model", "heads=3", "--data-dir", "nowhere"], ["multiple of heads"]),
    ("translation", ["--devices", "none"], ["devices must be a whole number"]),
    ("translation", ["--strategy", "luck"], ["strategy must be one of", "ddp"]),
    ("translation", ["--kernel", "rfb"], ["did you mean 'rbf'", "known: edp"]),
    ("recall", ["--data", "bible"], ["reads no corpus"]),
    ("translation", ["--option", "beam=0"], ["beam must be at least 1"]),
    ("weather", [], ["no task is called 'weather'", "translation", "language-modelling", "classification", "recall"]),
])
def test_a_wrong_value_is_told_in_words(kernelbook, folders, task, args, words):
    where = [] if folders.get(task) is None else ["--data-dir", folders[task]]
    code, _, said = kernelbook("train", task, "--preset", "smoke", "--accelerator", "cpu", *where, *args)
    assert code == 1 and all(word in said for word in words) and "Traceback" not in said and not os.listdir(".")


# ------------------------------------------------------------------------- every task, from a corpus to an answer

@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_a_record_tells_of_any_task(kernelbook, trained, task):
    folder, record = trained[task]
    metric = tasks.TASKS[task].metric
    assert record.task == task and metric in record.metrics and record.baselines and record.signature
    assert "weights" not in record.config and record.samples
    code, said, _ = kernelbook("results", "show", folder)
    assert code == 0 and record.name in said.replace("\n", "") and record.signature in said
    assert all(name.replace("_", " ") in said for name in record.baselines)


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_an_evaluation_without_arguments_repeats_the_record(kernelbook, trained, folders, task):
    folder, record = trained[task]
    data, again = tasks.evaluate(folder, data_dir=folders[task])
    assert again.metrics == {k: v for k, v in record.metrics.items() if k.startswith("test_")}
    assert again.baselines == record.baselines and data["fingerprint"] == record.data["fingerprint"]
    where = [] if folders[task] is None else ["--data-dir", folders[task]]
    code, said, _ = kernelbook("evaluate", folder, "--split", "valid", *where)
    assert code == 0 and f"{record.data['valid']} " in said and "valid" in said
    assert "test or valid" in kernelbook("evaluate", folder, "--split", "train", *where)[2]


def test_a_translator_is_evaluated_on_other_pairs_with_its_own_tokeniser(kernelbook, trained, tmp_path):
    other = tmp_path / "other-de-en"
    other.mkdir()
    for split, language in itertools.product(("train", "valid", "test"), ("de", "en")):
        (other / f"{split}.{language}").write_text("\n".join(f"other words {split} {i}" for i in range(12)))
    code, said, _ = kernelbook("evaluate", trained["translation"][0], "--data-dir", other)
    assert code == 0 and "12 pairs of other-de-en, test" in said.replace(" (first 12)", "")
    assert re.search(r"copy source +100.00", said)


def test_a_model_is_not_evaluated_on_data_it_cannot_read(kernelbook, trained, folders, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "all.tsv").write_text("".join(f"{'up' if i % 2 else 'down'}\tword{i}\n" for i in range(200)))
    code, _, said = kernelbook("evaluate", trained["classification"][0], "--data-dir", other)
    assert code == 1 and "labels" in said
    code, _, said = kernelbook("evaluate", trained["translation"][0])
    assert code == 1 and "name it with --data-dir" in said
    assert "no option called" in kernelbook("evaluate", trained["recall"][0], "--max-words", 3)[2]


def test_answers_of_trained_models(kernelbook, trained):
    code, said, _ = kernelbook("translate", trained["translation"][0], "red old", "", "--beam", 3,
                               "--length-penalty", 0.5)
    assert code == 0 and said.count("\n") == 2
    said = [kernelbook("generate", trained["language-modelling"][0], "red old", "--tokens", 5, "--count", 3, *more)[1]
            for more in ([], [], ["--seed", 1], ["--temperature", 0], ["--top-k", 1], ["--top-p", 0.0001])]
    assert all(text.count("\n") == 3 and text.startswith("red old") for text in said)
    assert said[0] == said[1] != said[2] and said[3] == said[4] == said[5] and len(set(said[3].splitlines())) == 1
    code, said, _ = kernelbook("classify", trained["classification"][0], "red old", "")
    labels, shares = zip(*(line.split("\t") for line in said.splitlines()), strict=True)
    assert code == 0 and len(labels) == 2 and {*labels} <= {"good", "bad"} and all(0.5 <= float(p) <= 1 for p in shares)


@pytest.mark.parametrize(("command", "task"), [("translate", "translation"), ("generate", "language-modelling"),
                                               ("classify", "classification")])
def test_a_model_of_another_task_is_refused_by_name(kernelbook, trained, command, task):
    for other in set(tasks.TASKS) - {task}:
        code, _, said = kernelbook(command, trained[other][0], "red")
        assert code == 1 and f"not trained for {task}, but for '{other}'" in said


# ------------------------------------------------------------------------- runs

def test_a_dry_run_tells_and_writes_nothing(kernelbook, folders):
    code, said, _ = kernelbook(*train(folders, "--dry-run", "--model", "width=16", "--kernel", "rbf"))
    assert code == 0 and not os.listdir(".") and "-rbf-width16-smoke-steps2-seed0" in said
    assert re.search(r"parameters  [\d,]+\nsteps       2\ntokens      [\d,]+ predicted, \d+ a step\ntime +about", said)


def test_a_corpus_of_the_readers_own_is_named_with_its_fingerprint(trained):
    record = trained["translation"][1]
    assert record.data["origin"] == "directory" and record.data["direction"] == "de-en"
    corpus = f"{record.data['corpus']}-{record.data['fingerprint'][:8]}"
    assert record.name == tasks.run_name("translation", corpus, "edp", "smoke", 0, settings={"steps": 2})
    assert trained["recall"][1].name == "recall-synthetic-edp-smoke-steps2-seed0"


def test_a_run_takes_its_seed_and_the_numbers_of_its_corpus(folders, trained, tmp_path, monkeypatch):
    kind = tasks.TASKS["translation"]
    small = kind.presets["smoke"].changed(model={"width": 16}, options={"vocabulary": 300})
    preset = dataclasses.replace(kind.presets["smoke"], corpora={"pairs-de-en": small})
    monkeypatch.setitem(tasks.TASKS, "translation", dataclasses.replace(kind, presets={"smoke": preset}))
    record, _ = tasks.train("translation", preset="smoke", data_dir=folders["translation"], settings={"steps": 1},
                            out=tmp_path / "a")
    assert (record.config["model"]["width"], record.config["settings"]["steps"]) == (16, 1)
    assert record.config["model"]["vocabulary"] <= 300
    monkeypatch.undo()
    record, _ = tasks.train("recall", preset="smoke", seed=3, settings={"steps": 2}, out=tmp_path / "b")
    first = trained["recall"][1]
    assert record.seed == record.config["settings"]["seed"] == 3 and record.name.endswith("-seed3")
    assert record.history[0]["train_loss"] != first.history[0]["train_loss"] and record.data == first.data


def test_early_stopping_and_averages_are_told_in_the_record(folders, tmp_path):
    restless = {"steps": 40, "average": 0.5, "patience": 1, "validate_every": 1, "learning_rate": 0.5}
    record, _ = tasks.train("translation", preset="smoke", data_dir=folders["translation"], settings=restless,
                            out=tmp_path / "a")
    weights = record.config["weights"]
    assert weights["average"] == 0.5 and 1 <= weights["step"] < weights["of"] < 40
    assert record.metrics["valid_loss"] == min(h["valid_loss"] for h in record.history)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "train.de").write_text("one line\n"), ["train.de has 1 lines", "train.en has 40"]),
    (lambda f: (f / "train.de").write_text(""), ["train.de is empty"]),
    (lambda f: (f / "train.de").write_bytes(b"\xff\xfe\xfa" * 9), ["train.de is not UTF-8"]),
    (lambda f: (f / "train.en").unlink(), ["train.de; expected two files"]),
    (lambda f: (f / "train.de").write_text("\n".join([" ".join(WORDS * 200)] + ["red old"] * 39)),
     ["training pair 1", "more than a batch of 512", "--setting batch_tokens=", "--option max_words="]),
])
def test_a_corpus_that_is_not_in_order_is_told_in_words(kernelbook, folders, tmp_path, damage, words):
    own = tmp_path / "own-de-en"
    own.mkdir()
    for file in folders["translation"].iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    damage(own)
    code, _, said = kernelbook(*train(folders | {"translation": own}))
    assert code == 1 and all(word in said for word in words) and "Traceback" not in said
    assert os.listdir(".") == ["own-de-en"]


def test_an_over_long_sentence_is_left_out_on_request_and_translated_all_the_same(kernelbook, folders, trained,
                                                                                  tmp_path):
    own = tmp_path / "own-de-en"
    own.mkdir()
    for file in folders["translation"].iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    for language in ("de", "en"):
        with open(own / f"train.{language}", "a") as file:
            file.write("\n" + "red " * 900)
    assert kernelbook(*train(folders | {"translation": own}, "--option", "max_words=9", "--out", "a"))[0] == 0
    assert results.load("a/record.json").data["train"] == 40
    code, said, _ = kernelbook("translate", trained["translation"][0], "red " * 100)
    assert code == 0 and said.count("\n") == 1


def test_a_state_of_another_configuration_is_refused_and_stays(kernelbook, folders, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kernelbook.tasks.translation.evaluation.translate", stop)
        assert kernelbook(*train(folders, "--out", "a"))[0] == 130
    state = Path("a/state.safetensors").read_bytes()
    for other in (["--kernel", "rbf"], ["--model", "layers=2"], ["--setting", "clip=2"], ["--precision", "64-true"],
                  ["--option", "vocabulary=300"]):
        code, _, said = kernelbook(*train(folders, "--out", "a", "--resume", *other))
        assert code == 1 and "another run" in said and Path("a/state.safetensors").read_bytes() == state
    assert kernelbook(*train(folders, "--out", "a", "--resume", "--setting", "accumulate=2"))[0] == 0
    assert sorted(os.listdir("a")) == ["model.safetensors", "record.json"]
    record = results.load("a/record.json")
    assert record.provenance["resumed"] and record.config["options"]["vocabulary"] == 500


def test_where_memory_runs_out_it_is_told_what_to_lower_and_nothing_is_lost(kernelbook, folders, monkeypatch):
    def scarce(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr("kernelbook.tasks.Translation.loss", scarce)
        code, _, said = kernelbook(*train(folders, "--out", "a"))
    assert code == 1 and all(word in said for word in ("out of memory", "batch_tokens (512)", "accumulate", "layers"))
    assert not Path("a").exists() and "Traceback" not in said
    with monkeypatch.context() as patch:
        patch.setattr("kernelbook.tasks.translation.evaluation.translate", scarce)
        with pytest.raises(OutOfMemory, match="in the evaluation.*kept in a/state.safetensors"):
            tasks.train("translation", preset="smoke", data_dir=folders["translation"], settings={"steps": 2}, out="a")
    assert os.listdir("a") == ["state.safetensors"]
    assert kernelbook(*train(folders, "--out", "a", "--resume"))[0] == 0


def test_a_mistake_deletes_no_earlier_run(kernelbook, folders):
    assert kernelbook(*train(folders, "--out", "a"))[0] == 0
    before = Path("a/record.json").read_bytes()
    for wrong in (["--model", "heads=3"], ["--kernel", "linear"], ["--setting", "clip=-1"], ["--devices", "x"],
                  ["--setting", "batch_tokens=2"]):
        assert kernelbook(*train(folders, "--out", "a", "--overwrite", *wrong))[0] == 1
        assert Path("a/record.json").read_bytes() == before and Path("a/model.safetensors").exists()


def test_reading_a_model_executes_nothing(kernelbook, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    torch.save({"trap": Trap()}, tmp_path / "saved.safetensors")
    save_tensors(tmp_path / "odd.safetensors", {}, {"kind": "model", "task": "translation", "config": {
        "architecture": "decoder", "vocabulary": 9, "kernel": {"kernel": "os.mkdir", "path": "sprung"}}})
    for name in ("model", "saved", "odd"):
        for command in ("translate", "generate", "classify", "evaluate"):
            code, _, said = kernelbook(command, tmp_path / f"{name}.safetensors")
            assert code == 1 and "Traceback" not in said
    assert not (tmp_path / "sprung").exists()


def test_two_processes_train_one_model_and_one_of_them_speaks(folders, tmp_path):
    args = map(str, train(folders, "--model", "dropout=0", "--out", tmp_path / "two", "--devices", 2))
    done = subprocess.run([sys.executable, "-m", "kernelbook", *args], capture_output=True, text=True, timeout=300,
                          cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    record = results.load(tmp_path / "two" / "record.json")
    assert done.stdout.count("this model") == 1 and record.provenance["processes"] == 2
    assert sorted(os.listdir(tmp_path / "two")) == ["model.safetensors", "record.json"]
    alone, _ = tasks.train("translation", preset="smoke", data_dir=folders["translation"], settings={"steps": 2},
                           model={"dropout": 0}, out=tmp_path / "one")
    assert alone.metrics["valid_loss"] == pytest.approx(record.metrics["valid_loss"], rel=1e-4)
    weights = [load_model(tmp_path / name)[0].state_dict() for name in ("one", "two")]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-4) for k in weights[0])


def test_a_folder_that_was_moved_is_told(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("KERNELBOOK_DATA", raising=False)
    with pytest.raises(DataError, match="--data-dir"):
        tasks.evaluate(trained["language-modelling"][0])
