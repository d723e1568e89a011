"""The command line, end to end, on a corpus of a few hundred sentences made here."""

import gzip
import io
import itertools
import json
import os
import signal

import pytest

from kernelbook import results, tasks

NOUNS = [("Hund", "dog"), ("Mann", "man"), ("Vogel", "bird"), ("Baum", "tree"), ("Fisch", "fish"), ("Stein", "stone")]
VERBS = [("sieht", "sees"), ("hört", "hears"), ("ruft", "calls"), ("trägt", "carries")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder laid out as Multi30k's, of all sentences 'Der X V den Y.', every seventh held out."""
    folder = tmp_path_factory.mktemp("corpora") / "multi30k"
    folder.mkdir()
    pairs = [(f"Der {a} {v} den {b}.", f"The {x} {w} the {y}.")
             for (a, x), (v, w), (b, y) in itertools.product(NOUNS, VERBS, NOUNS)]
    parts = {"val": pairs[::7], "test_2016_flickr": pairs[3::7],
             "train": [p for i, p in enumerate(pairs) if i % 7 not in (0, 3)]}
    for split, (side, language) in itertools.product(parts, enumerate(("de", "en"))):
        with gzip.open(folder / f"{split}.{language}.gz", "wt", encoding="utf8") as file:
            file.writelines(p[side] + "\n" for p in parts[split])
    return folder


def train(corpus, *more):
    return ("train", "translation", "--preset", "smoke", "--data-dir", corpus, "--accelerator", "cpu", *more)


def test_train_evaluate_translate_and_look_again(kernelbook, corpus, tmp_path):
    code, said, _ = kernelbook(*train(corpus, "--kernel", "rbf", "--steps", 150, "--out", "a"))
    record = results.load("a/record.json")
    assert code == 0 and record.metrics["test_bleu"] > 40 > 2 * max(record.baselines.values())
    assert f"{record.metrics['test_bleu']:.2f}" in said and "copy source" in said and record.signature in said
    assert said.count("reference ") == 3 and sorted(os.listdir("a")) == ["model.safetensors", "record.json"]

    code, said, _ = kernelbook("translate", "a", "Der Hund sieht den Baum.", "")
    assert code == 0 and said.splitlines() == ["The dog sees the tree.", ""]
    code, said, _ = kernelbook("evaluate", "a", "--data-dir", corpus.parent, "--data", "multi30k")
    assert code == 0 and f" {record.metrics['test_bleu']:.2f}" in said and record.signature in said
    code, said, _ = kernelbook("results", "list", ".")
    assert code == 0 and said.count(record.name[:20]) == 1
    assert kernelbook("results", "show", "a")[0] == 0


def test_a_record_has_all_it_takes_to_trust_it(kernelbook, corpus):
    kernelbook(*train(corpus, "--kernel", "taylor", "--kernel-option", "degree=4", "--seed", 5))
    record = json.loads(open("runs/translation-multi30k-taylor-degree4-smoke-seed5/record.json").read())
    p = record["provenance"]
    assert record["kernel"] == {"kernel": "taylor", "degree": 4} and record["seed"] == 5
    assert record["signature"].startswith("nrefs:1|") and record["parameters"] > 0
    assert p["device"] == "cpu" and p["wall_time_s"] > 0 and p["versions"]["torch"] and "commit" in p
    assert p["command"].startswith("kernelbook train translation --preset smoke")
    assert record["data"]["fingerprint"] and record["data"]["train"] > 100
    assert record["metrics"]["valid_perplexity"] == record["history"][-1]["valid_perplexity"]


def test_ctrl_c_in_the_evaluation_keeps_the_training(kernelbook, corpus, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kernelbook.evaluation.translate", stop)
        code, _, said = kernelbook(*train(corpus, "--out", "my run"))
    assert code == 130 and "--out 'my run' --resume" in said and os.listdir("my run") == ["state.safetensors"]
    code, _, said = kernelbook(*train(corpus, "--out", "my run", "--resume", "--kernel", "rbf"))
    assert code == 1 and "another run" in said and "kernel" in said
    assert kernelbook(*train(corpus, "--out", "my run", "--resume"))[0] == 0


def test_ctrl_c_keeps_what_was_done_and_resume_goes_on(kernelbook, corpus, monkeypatch):
    kernelbook(*train(corpus, "--out", "whole"))
    fit = tasks.run.fit

    def interrupted(*args, report, **kwargs):
        def stop(event):
            report(event)
            if event.get("step") == 7:
                os.kill(os.getpid(), signal.SIGINT)
        return fit(*args, report=stop, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tasks.run, "fit", interrupted)
        code, _, said = kernelbook(*train(corpus, "--out", "part"))
    assert code == 130 and "after step 7 of 20" in said and "--out part --resume" in said
    assert os.listdir("part") == ["state.safetensors"]
    assert "unfinished run" in kernelbook("translate", "part", "Der Hund.")[2]
    assert "--resume" in kernelbook(*train(corpus, "--out", "part"))[2]     # not overwritten by mistake
    assert kernelbook(*train(corpus, "--out", "part", "--resume"))[0] == 0
    whole, part = (open(f"{run}/model.safetensors", "rb").read() for run in ("whole", "part"))
    assert whole == part


@pytest.mark.parametrize(("args", "words"), [
    (["--kernel", "rfb"], ["did you mean 'rbf'", "known: edp"]),
    (["--kernel", "linear"], ["signed", "abs-sum"]),
    (["--kernel", "rbf", "--kernel-option", "degree=3"], ["no option 'degree'", "bandwidth"]),
    (["--kernel-option", "degree"], ["name=value"]),
    (["--preset", "fast"], ["no preset", "quick"]),
    (["--resume"], ["nothing to resume", "holds no interrupted run"]),
    (["--accelerator", "abacus"], ["abacus"]),
    (["--accelerator", "tpu"], ["accelerator must be one of", "not 'tpu'"]),
    (["--out", "/dev/null/run"], ["/dev/null is not a folder"]),
])
def test_a_mistake_is_told_in_words(kernelbook, corpus, args, words):
    code, _, said = kernelbook(*train(corpus, *args))
    assert code != 0 and all(word in said for word in words) and "Traceback" not in said


def test_a_finished_run_is_not_overwritten_unasked(kernelbook, corpus):
    assert kernelbook(*train(corpus, "--out", "a"))[0] == 0
    code, _, said = kernelbook(*train(corpus, "--out", "a"))
    assert code == 1 and "finished run" in said and "--overwrite" in said
    assert kernelbook(*train(corpus, "--out", "a", "--overwrite"))[0] == 0


def test_a_full_disk_at_the_end_leaves_the_run_resumable(kernelbook, corpus, monkeypatch):
    from kernelbook import files

    def full(path, *_):
        raise files.FileError(f"{path} was not written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("kernelbook.training.state.save_tensors",
                      lambda path, *a: full(path) if path.name == "model.safetensors" else files.save_tensors(path, *a))
        code, _, said = kernelbook(*train(corpus, "--out", "a"))
    assert code == 1 and "No space left" in said and os.listdir("a") == ["state.safetensors"]
    assert kernelbook(*train(corpus, "--out", "a", "--resume"))[0] == 0


def test_data_commands_say_what_there_is(kernelbook, tmp_path):
    code, said, _ = kernelbook("data", "list")
    assert code == 0 and "bible" in said and "72.8 MB" in said and str(tmp_path / "cache") in said.replace("\n", "")
    code, said, _ = kernelbook("data", "info", "bible")
    assert code == 0 and "public domain" in said and "not fetched" in said
    assert kernelbook("data", "clear") == (0, "freed 0 B\n", "")
    code, _, said = kernelbook("data", "fetch", "bibel")
    assert code == 1 and "bible" in said and "multi30k" in said


def test_each_line_of_the_input_is_one_line_of_the_output(kernelbook, corpus, monkeypatch):
    kernelbook(*train(corpus, "--steps", 1, "--out", "a"))
    lines = ["Der Hund\u2028sieht.".encode(), b"", "Größe 😀".encode(), "Größe".encode("latin1"), b"Ja."]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(lines))))
    code, said, _ = kernelbook("translate", "a")
    assert code == 0 and said.count("\n") == 5 and said.split("\n")[1] == ""
    assert kernelbook("translate", "a", os.fsdecode(b"Gr\xf6\xdfe"))[0] == 0


def test_what_is_not_a_model_is_refused(kernelbook, tmp_path):
    assert "does not exist" in kernelbook("translate", "nowhere", "Ja.")[2]
    (tmp_path / "x.safetensors").write_bytes(b"x" * 100)
    assert "cannot be read" in kernelbook("translate", "x.safetensors", "Ja.")[2]
    assert "no record lies in" in kernelbook("results", "list", "nowhere")[2]
