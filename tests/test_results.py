"""Records: what is stored is what comes back, and nothing else passes for one."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import pytest
import torch
from scipy import stats

from kernelbook import kernels, plotting, results
from kernelbook.files import FileError
from kernelbook.results import (
    AttentionSample,
    FailedRun,
    Group,
    Record,
    SuiteRecords,
    compare,
    find,
    load,
    load_attention,
    load_suite,
    provenance,
    read,
    save_attention,
    save_suite,
    table,
)

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
    with pytest.raises(FileError, match=f"no result is called '{record.stem}'.* {record.name}"):
        find(record.stem)       # near names are listed


# ------------------------------------------------------------------------- experiments

BLEU = {"EDP": [20.0, 21.5, 20.7, 19.8, 21.0], "RBF": [20.5, 21.9, None, 20.6, 21.2], "linear": [None, None, None]}
"""By label and seed; None is a run that diverged, and the last two of linear are missing."""


@pytest.fixture
def suite(tmp_path):
    """A suite of three variants as it lies on the disk, loaded."""
    names = {label: [f"translation-bible-{label}-smoke-seed{seed}" for seed in range(5)] for label in BLEU}
    groups = (Group("translation", "bible", "test_bleu", True, names),
              Group("recall", None, "test_accuracy", True, {"EDP": ["recall-seed0"]}))
    made = SuiteRecords("kernels", "smoke", "Which?", "EDP", {label: f"why {label}" for label in BLEU}, groups)
    for label, values in BLEU.items():
        for seed, value in enumerate(values):
            about = {"name": names[label][seed], "seed": seed, "kernel": {"kernel": label.lower()}}
            path = tmp_path / "smoke" / f"{about['name']}.json"
            if value is None:
                FailedRun(task="translation", corpus="bible", preset="smoke", error="the loss became nan", command="x",
                          **about).save(path)
                continue
            steps = [10, 19 + seed, 30]         # an epoch's length depends on the seed
            replace(RECORD, **about, metrics={"test_bleu": value}, config={"model": {"width": 32, "heads": 2}},
                    history=[{"step": s, "valid_loss": 6.0 - s / 10 + seed} for s in steps],
                    provenance={"wall_time_s": 10.0 + seed, "device": "cpu"}).save(path)
    save_suite(made, tmp_path)
    return load_suite("kernels", "smoke", folder=tmp_path)


def test_a_suite_comes_back_with_its_records(suite):
    assert suite.question == "Which?" and [g.title for g in suite.groups] == ["translation, bible", "recall"]
    runs = suite.runs("translation", "RBF")
    assert list(runs) == [0, 1, 2, 3, 4] and runs[0].metrics["test_bleu"] == 20.5
    assert isinstance(runs[2], FailedRun) and runs[2].error == "the loss became nan"
    assert list(suite.runs("translation", "linear", "bible")) == [0, 1, 2]
    assert suite.missing == [f"translation-bible-linear-smoke-seed{s}" for s in (3, 4)] + ["recall-seed0"]
    for mistake in (lambda: suite.runs("translation", "EI"), lambda: suite.group("recall", "bible"),
                    lambda: replace(suite, groups=suite.groups * 2).group("recall")):
        with pytest.raises(ValueError, match="no variant|no group|more than one"):
            mistake()


def test_means_and_paired_differences_are_students(suite):
    edp, rbf, linear = compare(suite, "translation")
    values = BLEU["EDP"]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert (edp["mean"], edp["low"], edp["high"]) == pytest.approx((sum(values) / 5, low, high))
    assert edp["sd"] == pytest.approx(stats.tstd(values)) and edp["n"] == 5 and edp["difference"] is None

    both = [s for s in range(5) if BLEU["RBF"][s] is not None]
    test = stats.ttest_rel([BLEU["RBF"][s] for s in both], [values[s] for s in both]).confidence_interval(0.95)
    assert (rbf["difference_low"], rbf["difference_high"]) == pytest.approx((test.low, test.high))
    assert rbf["difference"] == pytest.approx((test.low + test.high) / 2)
    assert rbf["p_value"] == rbf["p_adjusted"] and edp["p_adjusted"] is None      # one comparison: nothing to adjust
    assert (rbf["n"], rbf["pairs"], rbf["diverged"], rbf["missing"]) == (4, 4, 1, 0)
    assert rbf["feature_dimension"] == math.inf and rbf["wall_time_s"] == pytest.approx(12.0)

    assert (linear["mean"], linear["n"], linear["diverged"], linear["missing"]) == (None, 0, 3, 2)
    (nothing,) = compare(suite, "recall")
    assert nothing["mean"] is None and nothing["missing"] == 1


def test_one_seed_has_a_mean_and_no_interval(suite):
    one = {g.task: replace(g, names={k: v[:1] for k, v in g.names.items()}) for g in suite.groups}
    row = compare(replace(suite, groups=tuple(one.values())), "translation")[1]
    assert row["mean"] == 20.5 and row["low"] is None and row["sd"] is None and row["difference"] == 0.5


@pytest.mark.parametrize(("model", "dimension"), [({"width": 32, "heads": 2}, 17), ({"width": 32, "heads": 4}, 9),
                                                  ({"width": 32, "heads": 2, "qk_width": 3}, 4)])
def test_the_dimension_is_that_at_the_width_of_a_head(model, dimension):
    record = replace(RECORD, kernel={"kernel": "polynomial", "degree": 1}, config={"model": model})
    assert results.feature_dimension(record) == dimension


def test_learning_curves_are_drawn_up_at_common_steps(suite):
    edp, rbf = results.curves(suite, "translation")
    assert (edp["label"], edp["kernel"], edp["steps"]) == ("EDP", "edp", [10, 19, 30]) and len(rbf["runs"]) == 4
    for seed, run in enumerate(edp["runs"]):            # lines stay lines
        assert run == pytest.approx([6.0 - s / 10 + seed for s in edp["steps"]])


def test_a_list_of_runs_grows_and_other_corpora_stay(suite, tmp_path):
    names = suite.group("translation").names
    fewer = replace(suite, groups=(replace(suite.groups[0], names={k: v[:2] for k, v in names.items()}),))
    save_suite(fewer, tmp_path)
    assert load_suite("kernels", "smoke", folder=tmp_path) == suite         # two seeds take nothing away
    other = {"EDP": ["translation-bible-edp-smoke-steps9-seed0"]}
    save_suite(replace(suite, groups=(replace(suite.groups[0], names=other),)), tmp_path)
    again = load_suite("kernels", "smoke", folder=tmp_path)
    assert again.group("translation").names == other and again.group("recall") == suite.group("recall")


@pytest.mark.parametrize("damage", [lambda text: text[:200], lambda text: text.replace('"question"', '"frage"'),
                                    lambda text: "[]"])
def test_a_damaged_list_of_runs_is_refused(suite, tmp_path, damage):
    path = tmp_path / "smoke" / "suite-kernels-smoke.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(FileError, match="suite-kernels-smoke.json"):
        load_suite("kernels", "smoke", folder=tmp_path)
    save_suite(suite, tmp_path)
    assert load_suite("kernels", "smoke", folder=tmp_path) == suite


def test_what_is_missing_or_damaged_is_named(suite, tmp_path):
    with pytest.raises(FileError, match="no results of the suite 'kernels' at the preset 'gpu'.*results run kernels"):
        load_suite("kernels", "gpu", folder=tmp_path)
    path = tmp_path / "smoke" / f"{suite.groups[0].names['EDP'][3]}.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(FileError, match=f"{path.name} cannot be read.*delete it and make the run again"):
        load_suite("kernels", "smoke", folder=tmp_path)


def test_a_failed_run_is_no_record(suite, tmp_path):
    path = tmp_path / "smoke" / f"{suite.groups[0].names['linear'][0]}.json"
    assert read(path).kernel == {"kernel": "linear"}
    with pytest.raises(FileError, match="failed: the loss became nan"):
        load(path)
    path.write_text(path.read_text().replace('"error"', '"mistake"'))
    with pytest.raises(FileError, match="expected the keys"):
        read(path)


def test_results_in_subfolders_are_found(tmp_path, monkeypatch):
    (tmp_path / "results" / "quick").mkdir(parents=True)
    RECORD.save(tmp_path / "results" / "quick" / "a.json")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "kernelbook" / "results.py"))
    assert find("a.json") == tmp_path / "results" / "quick" / "a.json"
    with pytest.raises(FileError, match=r"no result is called 'quick' \(there are: a.json\)"):
        find("quick")


def test_reading_results_loads_no_training_code(suite, tmp_path):
    code = ("import sys; from kernelbook import results;"
            "s = results.load_suite('kernels', 'smoke', folder=sys.argv[1]);"
            "print(len(results.compare(s, 'translation')), len(results.curves(s, 'translation')));"
            "print([m for m in sys.modules if m.startswith(('kernelbook.t', 'kernelbook.exp', 'lightning'))])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["3 2", "[]"]


def test_a_suite_is_drawn_and_described(suite):
    panels = [(g, compare(suite, g.task)) for g in suite.groups]
    with plotting.style():
        figure = plotting.plot_suite(panels, "EDP")
        (ax,) = figure.axes                     # recall has no number yet, so no panel
        assert [t.get_text() for t in ax.get_yticklabels()] == ["EDP", "RBF", "linear"]
        drawn = {tuple(line.get_xdata()) for line in ax.lines}
        rbf = panels[0][1][1]
        assert (rbf["mean"],) in drawn and (rbf["low"], rbf["high"]) in drawn and (20.5, 21.9, 20.6, 21.2) in drawn
        assert {t.get_text() for t in ax.texts} == {"diverged", "1 diverged"}
        lines = [(g, results.curves(suite, g.task)) for g in suite.groups]
        curves = plotting.plot_curves(lines)
        assert len(curves.axes) == 1 and len(curves.axes[0].lines) == len(curves.axes[0].collections) == 2
        assert list(curves.axes[0].lines[0].get_ydata()) == pytest.approx([7.0, 6.1, 5.0])
        around = curves.axes[0].collections[0].get_datalim(curves.axes[0].transData)
        assert (around.y0, around.y1) == pytest.approx((3.0, 9.0))          # from the least seed to the greatest
        plt.close("all")
    text = plotting.describe_suite(panels)
    assert text.startswith("translation, bible: mean BLEU") and "RBF 21.05" in text and "linear diverged" in text
    assert plotting.describe_curves(lines).endswith("EDP from 7.00 to 5.00; RBF from 7.00 to 5.00.")
    with pytest.raises(ValueError, match="nothing to draw"):
        plotting.plot_suite(panels[1:])
    with pytest.raises(ValueError, match="nothing to draw"):
        plotting.plot_curves(lines[1:])
