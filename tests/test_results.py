"""Records: what is stored is what comes back, and nothing else passes for one."""

import json
import subprocess
from dataclasses import asdict, replace

import pytest
import torch

from kernelbook import kernels, results
from kernelbook.files import FileError
from kernelbook.results import AttentionSample, Record, find, load, load_attention, provenance, save_attention, table

RECORD = Record(name="run", task="translation", preset="smoke", seed=1, kernel={"kernel": "taylor", "degree": 4},
                metrics={"test_bleu": 12.5}, baselines={"copy_source": 0.5, "most_frequent_sentence": 0.7},
                signature="nrefs:1", data={"name": "bible"}, config={}, parameters=10,
                samples=[{"source": "Tür", "reference": "door", "translation": "door"}],
                provenance=provenance(command="kernelbook train"))


def test_a_record_comes_back(tmp_path):
    assert load(RECORD.save(tmp_path / "r.json")) == RECORD


def test_provenance_says_where_and_with_what():
    p = RECORD.provenance
    assert p["device"] == "cpu" and p["threads"] >= 1 and p["command"] == "kernelbook train"
    assert p["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and p["versions"]["sacrebleu"]


def test_the_commit_is_marked_where_the_source_was_changed_since(tmp_path, monkeypatch):
    source = tmp_path / "kernelbook" / "results.py"
    source.parent.mkdir()
    source.write_text("as committed")
    monkeypatch.setattr(results, "__file__", str(source))
    assert provenance()["commit"] is None           # an installed package
    for args in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", tmp_path, *args], check=True)
    (tmp_path / "notes").write_text("not source")
    commit = provenance()["commit"]
    source.write_text("changed")
    assert len(commit) == 40 and provenance()["commit"] == commit + "+"


@pytest.mark.parametrize("damage", [
    lambda plain: plain | {"schema": 99},
    lambda plain: {k: v for k, v in plain.items() if k != "metrics"},
    lambda plain: plain | {"more": 1},
    lambda plain: [plain],
])
def test_what_is_not_a_record_is_refused(tmp_path, damage):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(damage(asdict(RECORD))))
    with pytest.raises(FileError, match="not a results record of schema 1"):
        load(path)


def test_a_truncated_record_is_refused(tmp_path):
    path = RECORD.save(tmp_path / "r.json")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileError, match="cannot be read as a results record"):
        load(path)


def test_the_table_is_sorted_and_shows_the_best_trivial_system():
    rows = table([replace(RECORD, seed=2, kernel={"kernel": "rbf"}), replace(RECORD, seed=3), RECORD])
    assert [(r["kernel"], r["seed"]) for r in rows] == [("RBF()", 2), ("Taylor(degree=4)", 1), ("Taylor(degree=4)", 3)]
    assert rows[0]["metric"] == 12.5 and rows[0]["baseline"] == 0.7


def test_attention_samples_come_back(tmp_path):
    sample = AttentionSample(["ein", "Satz"], ["a", "sentence", "."], torch.randn(2, 4, 3, 8), torch.randn(2, 4, 2, 8),
                             "ein Satz", "a sentence.", kernels.RBF(bandwidth=2.0), "run")
    (back,) = load_attention(save_attention(tmp_path / "a.safetensors", [sample]))
    assert torch.equal(back.queries, sample.queries) and torch.equal(back.keys, sample.keys)
    assert back.kernel == sample.kernel and back.source_tokens == sample.source_tokens


def test_the_books_results_are_found_by_name_and_hold_no_path_of_the_machine():
    record = find("translation-bible-rbf-quick-seed0.json")
    assert load(record).name == record.stem and "/" not in load(record).provenance["command"]
    with pytest.raises(FileError, match=f"no result is called 'nothing'.*{record.stem}"):
        find("nothing")
