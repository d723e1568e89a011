"""Keep of trained translators what their attention does on a few sentences of our own, and what they make of them.

    python tools/keep_attention.py five-kernels-multi30k-quick runs/translation-multi30k-edp-... runs/... \\
        --translations runs/translation-multi30k-constant-...

writes ``results/NAME.attention.safetensors``, with queries and keys of the cross attention from each sentence's
translation (ours, not the model's) to the sentence, for one run after the other; and ``results/NAME.sentences.json``,
with the sentences, which words of the two belong together, and each run's own translations.  Of the runs that follow
``--translations`` nothing else is kept.

Experiments do not keep their models.  A run is trained once more by the command in its record, and is taken here only
if it came out as that record says.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from keep_run import finished

ROOT = Path(__file__).resolve().parent.parent

#: German, English, and for each English word which of the German ones it translates, counted from 0. Words are what
#: white space and punctuation marks separate; a mark is a word. Written for this book; in no corpus that we know of.
SENTENCES = (
    ("Ein kleiner Junge spielt mit einem roten Ball im Garten.",
     "A little boy plays with a red ball in the garden.",
     "0 1 2 3 4 5 6 7 8 8 9 10"),
    ("Auf einer Bank im Park schläft ein alter Mann.",
     "An old man sleeps on a bench in the park.",
     "6 7 8 5 0 1 2 3 3 4 9"),
    ("Zwei Frauen mit Hüten kaufen auf dem Markt Brot.",
     "Two women with hats buy bread at the market.",
     "0 1 2 3 4 8 5 6 7 9"),
    ("Ein Hund springt über einen Zaun, um einen Stock zu fangen.",
     "A dog jumps over a fence to catch a stick.",
     "0 1 2 3 4 5 7,10 11 8 9 12"),
    ("Die Frau im gelben Kleid hat ihr Fahrrad an eine Wand gelehnt.",
     "The woman in the yellow dress has leaned her bike against a wall.",
     "0 1 2 2 3 4 5 11 6 7 8 9 10 12"),
)


def main() -> None:
    from kernelbook import data, results
    from kernelbook.evaluation import attention_sample, translate
    from kernelbook.files import write_whole
    from kernelbook.training import load_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of the two files, without their endings")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, in the order to be kept")
    parser.add_argument("--translations", type=Path, nargs="*", default=[], help="folders of further finished runs")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the two files")
    args = parser.parse_args()
    sources, targets = [s for s, _, _ in SENTENCES], [t for _, t, _ in SENTENCES]
    samples, translations = [], {}
    for folder in [*args.runs, *args.translations]:
        record, path = finished(folder)
        if path is None:
            sys.exit(f"there is no record of {record.name}; keep it with: python tools/keep_run.py {folder}")
        model, metadata = load_model(folder)
        tokenizer = data.Tokenizer.from_json(metadata["tokenizer"])
        if folder in args.runs:
            samples += [attention_sample(model, tokenizer, s, t, record=record.name)
                        for s, t in zip(sources, targets, strict=True)]
        translations[record.name] = translate(model, tokenizer, sources)
    about = [{"source": s, "target": t, "alignment": alignment,
              "translations": {name: found[i] for name, found in translations.items()}}
             for i, (s, t, alignment) in enumerate(SENTENCES)]
    text = write_whole(args.out / f"{args.name}.sentences.json",
                       json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    path = results.save_attention(args.out / f"{args.name}.attention.safetensors", samples)
    for kept_file in (text, path):
        print(f"{kept_file}: {kept_file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
