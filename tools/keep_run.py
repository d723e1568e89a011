"""Keep of a trained run what the book needs: its record, and queries and keys of its attention on a few pairs.

    python tools/keep_run.py runs/translation-bible-rbf-quick-seed0

writes ``results/NAME.json`` and, with ``--attention``, ``results/NAME.attention.safetensors``.  The pairs are not
picked by hand: they are the first of the test split with 5 to 9 words on each side, none with the same target as one
before it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS, WORDS = 4, range(5, 10)


def main() -> None:
    from kernelbook import data, results
    from kernelbook.evaluation import attention_sample
    from kernelbook.training import load_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--attention", action="store_true", help="keep queries and keys too")
    parser.add_argument("--data-dir", type=Path, help="folder of the corpus, if it is not package data")
    args = parser.parse_args()
    record = results.load(args.run / "record.json")
    if record.data["origin"] == "directory":     # a reader's own corpus: its sentences are not ours to give
        record = replace(record, samples=[])
    print(record.save(ROOT / "results" / f"{record.name}.json").relative_to(ROOT))
    if not args.attention:
        return
    model, metadata = load_model(args.run)
    tokenizer = data.Tokenizer.from_json(metadata["tokenizer"])
    corpus = data.load_translation(record.data["corpus"], data_dir=args.data_dir)
    fitting = [p for p in corpus.test if len(p.source.split()) in WORDS and len(p.target.split()) in WORDS]
    first: dict[str, data.Pair] = {}
    for pair in fitting:
        first.setdefault(pair.target, pair)
    pairs = list(first.values())[:PAIRS]
    if len(pairs) < PAIRS:
        sys.exit(f"the test split of {corpus.name} has only {len(pairs)} pairs of 5 to 9 words, {PAIRS} are wanted")
    samples = [attention_sample(model, tokenizer, p.source, p.target, record=record.name) for p in pairs]
    path = results.save_attention(ROOT / "results" / f"{record.name}.attention.safetensors", samples)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
