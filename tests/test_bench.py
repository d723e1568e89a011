"""The benchmark's own machinery, on work of known cost; no test depends on how fast this machine is."""

import importlib
import json
import math

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import pytest
import torch
from torch.nn import functional as F

from kernelbook import bench, cli, plotting
from kernelbook.attention import PATHS, attend
from kernelbook.bench import Candidate, Setting, Shape
from kernelbook.files import FileError
from kernelbook.kernels import EDP


class Machine:
    """A clock that only work moves on, and a machine that slows down by and by."""

    def __init__(self, slower=1.0):
        self.now, self.slowness, self.slower = 0.0, 1.0, slower
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, cost):
        def once():
            self.calls.append(name)
            self.now += cost * self.slowness
            self.slowness *= self.slower
        return once


# ---- times

def test_ratios_are_those_of_the_costs_even_on_a_machine_that_slows_down():
    costs = {"slow": 0.3, "unit": 0.1, "quick": 0.02}
    machine = Machine(slower=1.002)
    found = bench.interleaved({name: machine.work(name, cost) for name, cost in costs.items()}, "unit", rounds=5,
                              least=0.2, most=100, clock=machine)
    assert list(found) == list(costs) and machine.slowness > 1.1
    for name, row in found.items():
        assert row["ratio"] == pytest.approx(costs[name] / 0.1, rel=0.05) and row["rounds"] == 5
        assert row["low"] <= row["ratio"] <= row["high"]
    assert found["unit"]["ratio"] == found["unit"]["low"] == found["unit"]["high"] == 1


def test_every_candidate_has_its_turn_in_every_round_and_short_calls_are_repeated():
    machine = Machine()
    work = {name: machine.work(name, cost) for name, cost in {"unit": 0.01, "a": 0.01, "b": 0.1}.items()}
    bench.interleaved(work, "unit", rounds=2, least=0.04, most=100, clock=machine)
    assert machine.calls == (["unit", "a", "b"]                                     # warming up
                             + ["unit"] * 4 + ["a"] * 4 + ["b"]                     # there
                             + ["unit"] * 4 + ["b"] + ["a"] * 4)                    # and back


def test_the_unit_is_timed_anew_when_its_time_is_old():
    machine = Machine()
    work = {name: machine.work(name, cost) for name, cost in {"unit": 0.1, "a": 0.4, "b": 0.4, "c": 0.4}.items()}
    bench.interleaved(work, "unit", rounds=1, clock=machine)
    assert machine.calls[4:] == ["unit", "a", "b", "unit", "c"]


def test_what_takes_long_gets_fewer_rounds_and_what_fails_is_said_to():
    machine = Machine()

    def broken():
        raise RuntimeError("no such instruction\nand more")

    work = {name: machine.work(name, cost) for name, cost in {"unit": 1, "slow": 9, "wanted": 9}.items()}
    found = bench.interleaved(work | {"broken": broken}, "unit", rounds=4, most=5, patient={"wanted"}, clock=machine)
    assert found["slow"]["rounds"] == 1 and found["slow"]["ratio"] == pytest.approx(9)
    assert found["wanted"]["rounds"] == 3
    assert found["broken"] == {"failed": "RuntimeError: no such instruction"}
    with pytest.raises(RuntimeError, match="no such"):
        bench.interleaved({"unit": broken, "other": machine.work("other", 1)}, "unit", clock=machine)


# ---- memory

def test_peak_counts_what_is_alive_at_one_time():
    def once():
        a = torch.empty(250_000)                        # 1 MB
        b = torch.empty(500_000)                        # 3 MB in all
        del a
        return b, torch.empty(100_000)                  # 2.4 MB

    assert bench.peak_bytes(once) == pytest.approx(3e6, rel=1e-3)


def test_the_definition_keeps_arrays_of_n_by_n_and_fused_attention_does_not():
    n = 256
    shape = Shape(n, d=16, heads=2)
    sizes = {c.name: bench.peak_bytes(c.work("forward+backward", *shape.tensors()))
             for c in bench.candidates(shape, compiled=False)[0] if c.name in ("SDPA", "edp fused", "edp exact")}
    assert sizes["edp exact"] > 2 * 4 * 2 * n * n > 2 * sizes["edp fused"]


# ---- candidates

def _wrong(shape, compiled):
    """Takes (batch, heads, n, d) for (batch, n, heads, d): attends across the heads, and has the right shape."""
    def function(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    yield Candidate("across heads", function, lambda q, k, v: attend(q, k, v, "edp", path="exact"), {"who": "nobody"})


def test_a_candidate_with_a_wrong_layout_is_found_out_and_not_timed(monkeypatch):
    monkeypatch.setitem(bench.PEERS, "wrong", _wrong)
    (wrong,) = _wrong(Shape(32), False)
    assert bench.output_error(wrong, Shape(32)) > 0.1
    record = bench.run(Setting(quick=True, only=("attention n=128 forward across heads",)))
    (row,) = [row for row in record["rows"] if row["candidate"] == "across heads"]
    assert row["wrong"] > 0.1 and "ratio" not in row


@pytest.mark.parametrize("causal", [False, True])
def test_every_candidate_computes_what_its_definition_says(causal):
    shape = Shape(64, d=16, heads=2, causal=causal)
    found, _ = bench.candidates(shape, compiled=False)
    names = [c.name for c in found]
    assert names[0] == bench.UNIT and len(set(names)) == len(names)
    assert {c.about["path"] for c in found if c.about["who"] == "kernelbook"} == set(PATHS)
    for c in found:
        assert c.skipped or bench.output_error(c, shape) < 1e-5, c.name


def test_a_package_that_is_missing_is_named_and_one_that_is_broken_too(monkeypatch):
    def gone(name, *_):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(bench, "import_module", gone)
    monkeypatch.setattr(bench, "_version", lambda package: "1.0" if package == "performer-pytorch" else None)
    found, absent = bench.candidates(Shape(8, d=4), compiled=False)
    assert {c.about["who"] for c in found} == {"torch", "kernelbook"}
    assert "pip install x-transformers" in absent["x-transformers"]
    assert "cannot be imported" in absent["performer-pytorch"]
    assert "GPU" in absent["flash-linear-attention"]


# ---- crossover and targets

def test_crossing_is_where_the_ratio_stays_below_1():
    def rows(*ratios):
        return [{"n": 128 << i, "ratio": r} for i, r in enumerate(ratios)]

    assert bench.crossing(rows(4, 2, 0.5)) == pytest.approx(256 * math.sqrt(2))
    assert bench.crossing(rows(0.9, 2, 1, 0.5)) == pytest.approx(512)
    assert bench.crossing(rows(0.5, 0.25)) == 128
    assert bench.crossing(rows(0.5, 2)) is None and bench.crossing([]) is None


def test_auto_from_is_the_first_length_of_the_linear_path(monkeypatch):
    monkeypatch.setattr(bench, "choose", lambda call: "linear" if call.n >= 137 * call.d else "exact")
    assert bench.auto_from(EDP(), 3) == 411
    monkeypatch.setattr(bench, "choose", lambda call: "exact")
    assert bench.auto_from(EDP(), 3) is None


def test_verdicts_take_the_worst_and_leave_open_what_was_not_measured():
    rows = [{"suite": "s", "candidate": c, "ratio": r} for c, r in (("a", 1.0), ("b", 3.0), ("naive", 12.0))]
    T = bench.Target
    found = bench.verdicts({"rows": rows}, [
        T("all small", {"suite": "s"}, 12.0), T("a and b", {"suite": "s", "candidate": "b"}, 2.9),
        T("gain", {"suite": "s", "candidate": "naive"}, 4.0, over={"candidate": "b"}, at_least=True),
        T("gain", {"suite": "s", "candidate": "naive"}, 4.1, over={"candidate": "b"}, at_least=True),
        T("open", {"suite": "other"}, 1.0),
        T("open", {"suite": "s", "candidate": "naive"}, 1.0, over={"candidate": "c"})])
    assert [(v["value"], v["met"], v["which"]) for v in found] == [
        (12.0, True, "naive"), (3.0, False, "b"), (4.0, True, "naive"), (4.0, False, "naive"), (None, None, None),
        (None, None, None)]


# ---- the record

@pytest.fixture
def two_blocks(monkeypatch):
    """A benchmark of two blocks, which counts how often each is measured."""
    measured = []

    def block(case):
        def measure(note):
            measured.append(case)
            note("working")
            return [{"candidate": case, "n": 1, "pass": "forward", "ratio": 1.23456789}]
        return bench.Block("attention", case, measure)

    monkeypatch.setattr(bench, "blocks", lambda setting: [block("one"), block("two")])
    return measured


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(two_blocks, tmp_path):
    path = tmp_path / "record.json"

    def stop(event):
        if event.get("block") == "attention two":
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        bench.run(Setting(threads=2), path, report=stop)
    assert torch.get_num_threads() == threads
    kept = bench.load(path)
    assert kept["blocks"] == ["attention one"] and not kept["complete"] and kept["kind"] == "benchmark"
    events = []
    record = bench.run(Setting(threads=2), path, resume=True, report=events.append)
    assert two_blocks == ["one", "two"] and record["complete"] and record["rows"][:1] == kept["rows"]
    assert record["rows"][1] == {"suite": "attention", "candidate": "two", "n": 1, "pass": "forward", "ratio": 1.235}
    assert json.loads(path.read_text()) == record == bench.load(path)
    assert {"doing": "working"} in events and events[0] == {"block": "attention two", "number": 1, "of": 2}
    assert record["provenance"]["versions"]["torch"] == torch.__version__ and record["provenance"]["threads"] == 2


def test_a_pattern_that_matches_nothing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "blocks", lambda setting: [bench.Block("attention", "one", lambda note: [])])
    with pytest.raises(ValueError, match="'rfb'.* is part of a name"):
        bench.run(Setting(only=("rfb",)), tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()


def test_a_record_is_neither_replaced_nor_mixed_unasked(two_blocks, tmp_path):
    path = tmp_path / "record.json"
    bench.run(Setting(), path)
    with pytest.raises(FileError, match="--overwrite"):
        bench.run(Setting(), path)
    with pytest.raises(FileError, match="setting"):
        bench.run(Setting(rounds=2), path, resume=True)
    bench.run(Setting(rounds=2), path, overwrite=True)
    assert bench.load(path)["setting"]["rounds"] == 2
    for text in ("{", "[]", '{"kind": "benchmark", "name": "other"}'):
        path.write_text(text)
        with pytest.raises(FileError):
            bench.load(path)


def test_stopping_says_how_to_go_on(two_blocks, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kernelbook", "bench", "--out", "record.json"])
    run, stop_at = bench.run, []

    def interrupted(*args, report, **options):
        def told(event):
            report(event)
            if event.get("block") in stop_at:
                raise KeyboardInterrupt
        return run(*args, report=told, **options)

    monkeypatch.setattr(bench, "run", interrupted)
    for stop_at[:], message in ((["attention one"], "before the first block"),
                                (["attention two"], "record.json --resume")):
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 130 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"rounds": 0}, {"device": "mps"}, {"device": "cuda"}])
def test_a_setting_that_cannot_be_is_refused(wrong):
    if wrong.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError):
        Setting(**wrong)


# ---- all of it, small

def test_two_candidates_from_the_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("sys.argv", ["kernelbook", "bench", "--quick", "--rounds", "2", "--figure", "costs.png",
                                     "--only", "attention n=128 * rbf fused", "--only", "training n=16 rbf",
                                     "--only", "decoding", "--only", "accuracy rbf", "--only", "module * rbf"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    said = capsys.readouterr()
    record = bench.load("benchmark-attention-cpu-quick.json")
    assert record["complete"] and (tmp_path / "costs.png").stat().st_size > 1000
    names = {suite: [r["candidate"] for r in record["rows"] if r["suite"] == suite] for suite in
             ("attention", "memory", "module", "training", "decoding", "accuracy")}
    assert names == {"attention": ["SDPA", "rbf fused"] * 2, "memory": [],
                     "module": ["edp", "rbf"] * 2, "training": ["edp", "rbf"], "decoding": ["edp", "edp, no cache"],
                     "accuracy": ["rbf fused"] * 3}
    for row in record["rows"]:
        assert "failed" not in row and "wrong" not in row
        assert row["suite"] == "accuracy" or row["ratio"] > 0
    assert "rbf fused" in said.out and "not measured" in said.out and "attention n=128 forward" in said.err


def test_the_figure_has_a_row_a_candidate_and_a_mark_a_length():
    rows = [{"suite": "attention", "candidate": c, "who": who, "kernel": kernel, "path": path, "auto": auto, "n": n,
             "pass": p, "ratio": r * n / 128}
            for c, who, kernel, path, auto, r in (
                ("SDPA", "torch", "edp", "", None, 1.0), ("peer", "elsewhere", "rbf", "", None, 2.0),
                ("rbf fused", "kernelbook", "rbf", "fused", True, 1.2),
                ("rbf exact", "kernelbook", "rbf", "exact", False, 50.0))
            for n in (128, 512) for p in bench.PASSES]
    for mode in ("light", "dark"):
        with plotting.style(mode):
            figure = plotting.plot_benchmark({"rows": rows})
            left, right = figure.axes
            assert [t.get_text() for t in left.get_yticklabels()] == ["rbf", "peer"]
            marks = [(line.get_xdata()[0], line.get_marker(), line.get_markerfacecolor() == line.get_color())
                     for line in left.lines if line.get_marker() != "None"]
            assert marks == [(1.2, "o", True), (4.8, "s", True), (2.0, "o", False), (8.0, "s", False)]
            figure = plotting.plot_benchmark({"rows": rows}, candidates=["rbf exact", "SDPA"])
            assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["rbf exact", "SDPA"]
            with pytest.raises(ValueError, match="causal"):
                plotting.plot_benchmark({"rows": rows}, suite="causal")
            plt.close("all")


def test_the_script_has_the_same_options(monkeypatch):
    seen = []
    spec = importlib.util.spec_from_file_location("attention_benchmark", "benchmarks/attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["attention.py"])
    monkeypatch.setattr(cli, "main", lambda: seen.append(list(__import__("sys").argv)))
    module.main(["--rounds", "3"])
    module.main(["--quick"])
    *options, out, path = seen[0]
    assert options == ["kernelbook", "bench", "--rounds", "3"] and out == "--out"
    assert path.endswith("benchmark-attention-cpu.json")
    assert seen[1] == ["kernelbook", "bench", "--quick"]
