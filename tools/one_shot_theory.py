"""Keep of a trained one-shot run what the theory makes of its attention, and what its heads are worth.

    python tools/one_shot_theory.py runs/one-shot-omniglot-edp-laptop-seed0

writes ``RUN-theory.json`` beside the run's record in ``results/``: :func:`kernelbook.paths.pruning.examine`, with the
name and metrics of the run, how its episodes were drawn, and where and with what this was made.  Several folders are
taken one after the other.  The episodes of the test are those of the record, and the network must come out on them as
it says.

A run with 16 paths takes about two minutes of one core, most of it for the order parameters at 42 pairs of a width and
a temperature, and 2.5 GB of memory; --widths and --temperatures make it shorter.

Experiments do not keep their models unless they are told to: kernelbook results run ... --keep-models.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keep_run import finished

KIND = "theory of a one-shot run"


def theory_of(folder: Path, *, data_dir: Path | None = None, training: int = 600, least: int = 2000,
              report: Callable[[dict[str, Any]], None] = lambda event: None, **more: Any) -> dict[str, Any]:
    """What is kept of a finished run in a folder; what else is given goes to :func:`kernelbook.paths.pruning.examine`.

    At least so many test episodes must there be.
    """
    from kernelbook import results
    from kernelbook.paths.pruning import examine
    from kernelbook.tasks import TASKS, Preset
    from kernelbook.tasks.base import seeded
    from kernelbook.training import Settings, load_model

    record, (network, metadata) = results.load(folder / "record.json"), load_model(folder)
    if record.task != "one-shot":
        raise ValueError(f"{folder} holds a run of {record.task}, and the theory is of those of one-shot")
    about, start = metadata["run"], time.monotonic()
    words = ["python", "tools/one_shot_theory.py", f"runs/{record.name}", "--training", training]
    for name in ("widths", "temperatures"):
        words += [f"--{name}", *(f"{value:g}" for value in more[name])] if name in more else []
    made = results.provenance(command=" ".join(map(str, words)))        # where it lay here is nobody's business
    task = TASKS["one-shot"].prepare(about["corpus"], data_dir,
                                     Preset(Settings(**about["settings"]), {}, about["options"], metadata=metadata))
    if task.data["fingerprint"] != record.data["fingerprint"]:
        raise ValueError(f"{folder} was trained on other images or episodes than those of {task.data['corpus']} here")
    if record.data["test"] < least:
        raise ValueError(f"{folder} was tested on {record.data['test']:,} episodes, and at least {least:,} are wanted: "
                         "train it with --option test_episodes")
    kinds = ["", *task.kinds("test")]
    found = examine(network, task.further(training, "theory"), task.held_out("valid", ""),
                    (("_".join(filter(None, ("test", kind))), task.held_out("test", kind)) for kind in kinds),
                    generator=seeded(f"one-shot/{record.seed}/random orders"), report=report, **more)
    for name, value in found["network"]["accuracy"].items():
        said = record.metrics[f"{name}_accuracy"] if name != "valid" else value
        if abs(said - value) > 0.002:                   # in float64 a few outputs near 0 may have another sign
            raise ValueError(f"{folder} did not come out as its record says: {name}_accuracy is {value}, not {said}")
    made["wall_time_s"] = round(time.monotonic() - start, 1)
    return {"kind": KIND, "schema": 1, "run": record.name, "preset": record.preset, "seed": record.seed,
            "kernel": record.kernel, "metrics": record.metrics,
            "drawn": {"training": f"one-shot/{record.seed}/theory/{training}", "valid": "one-shot/valid/"}
            | {"_".join(filter(None, ("test", kind))): f"one-shot/test/{kind}" for kind in kinds}
            | {"random": f"one-shot/{record.seed}/random orders"},
            "images": record.data["images"], **found, "provenance": made}


def main() -> None:
    from kernelbook.files import write_whole
    from kernelbook.paths.pruning import TEMPERATURES, WIDTHS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, with their models")
    parser.add_argument("--data-dir", type=Path, help="folder of the images, if they are not package data")
    parser.add_argument("--out", type=Path, help="folder to write to, instead of that of the run's record")
    parser.add_argument("--training", type=int, default=600, help="how many episodes the theory is given")
    parser.add_argument("--least", type=int, default=2000, help="refuse a run with fewer test episodes")
    parser.add_argument("--widths", type=float, nargs="+", default=WIDTHS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    args = parser.parse_args()

    def progress(event: dict[str, Any]) -> None:
        print(f"  {event['done']:3} of {event['of']}: N = {event['width']:g}, T = {event['temperature']:g}, "
              f"{100 * event['accuracy']:.1f} % of the validation episodes"
              f"{'' if event['converged'] else ', did not converge'}", file=sys.stderr, flush=True)

    for folder in args.runs:
        try:                                            # errors of files and data are RuntimeErrors
            record, path = finished(folder)
            if path is None and args.out is None:
                sys.exit(f"there is no record of {record.name}; keep it with: python tools/keep_run.py {folder}")
            print(record.name, file=sys.stderr)
            found = theory_of(folder, data_dir=args.data_dir, training=args.training, least=args.least, report=progress,
                              widths=args.widths, temperatures=args.temperatures)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"error: {error}")
        print(write_whole((args.out or path.parent) / f"{record.name}-theory.json",
                          json.dumps(found, ensure_ascii=False) + "\n"))


if __name__ == "__main__":
    main()
