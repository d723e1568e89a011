"""Keep of a trained run what the book needs: its record, and queries and keys of its attention on a few texts.

    python tools/keep_run.py runs/translation-bible-rbf-quick-seed0

writes ``results/NAME.json`` and, with ``--attention``, ``NAME.attention.safetensors`` beside it.  If the record is kept
already, as those of experiments are, it stays, and the run must have come out as it says.

The texts are not picked by hand.  For a translator they are the first pairs of the test split with 5 to 9 words on each
side, none with the same target as one before it; for a classifier, the first texts of 20 to 32 words.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COUNT, PAIR_WORDS, TEXT_WORDS = 4, range(5, 10), range(20, 33)


def texts_of(task: str, corpus: Any) -> list[tuple[str, ...]]:
    """What attention is kept of: pairs of source and target, or single texts."""
    if task == "classification":
        return [(text,) for text, _ in corpus.test if len(text.split()) in TEXT_WORDS][:COUNT]
    first: dict[str, tuple[str, ...]] = {}
    for p in corpus.test:
        if len(p.source.split()) in PAIR_WORDS and len(p.target.split()) in PAIR_WORDS:
            first.setdefault(p.target, (p.source, p.target))
    return list(first.values())[:COUNT]


def finished(run: Path) -> tuple[Any, Path | None]:
    """The record of a finished run, and the file where it is kept, if it is: the run must have come out as it says."""
    from kernelbook import results
    from kernelbook.files import FileError

    record = results.load(run / "record.json")
    try:
        path = results.find(f"{record.name}.json")
    except FileError:
        return record, None
    if (there := results.load(path)).metrics != record.metrics:
        sys.exit(f"{run} did not come out as {path.name} says: it has {record.metrics}, and there is {there.metrics}; "
                 f"train it again with: {there.provenance['command']}; or delete that file to keep this run instead")
    return record, path


def main() -> None:
    from kernelbook import data, results
    from kernelbook.evaluation import attention_sample
    from kernelbook.training import load_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--attention", action="store_true", help="keep queries and keys too")
    parser.add_argument("--data-dir", type=Path, help="folder of the corpus, if it is not package data")
    args = parser.parse_args()
    record, path = finished(args.run)
    if path is None:
        path = ROOT / "results" / f"{record.name}.json"
        command = re.sub(r" --out \S+", "", record.provenance["command"])    # where it lay here is nobody's business
        print(results.kept(record, command).save(path).relative_to(ROOT))
    if not args.attention:
        return
    load = {"translation": data.load_translation, "classification": data.load_labelled}.get(record.task)
    if load is None:
        sys.exit(f"attention is kept of translators and classifiers, and this is a run of {record.task}")
    corpus = load(record.data["corpus"], data_dir=args.data_dir)
    texts = texts_of(record.task, corpus)
    if len(texts) < COUNT:
        sys.exit(f"the test split of {corpus.name} has {len(texts)} texts of the lengths wanted, not {COUNT}")
    model, metadata = load_model(args.run)
    tokenizer = data.Tokenizer.from_json(metadata["tokenizer"])
    samples = [attention_sample(model, tokenizer, *text, record=record.name) for text in texts]
    path = results.save_attention(path.with_suffix(".attention.safetensors"), samples)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
