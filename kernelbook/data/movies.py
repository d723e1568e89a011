"""Sentences of film reviews as positive or negative: the exact rules by which the rated sentences become a corpus.

The raw material is a text file of three columns, separated by tabs: number, mean rating by at least 20 people from -4
to 4, sentence. The sentences are sorted by film, and so by sentiment.

**Text** (``clean``). Unicode normal form C; curly quotation marks become straight ones, and two apostrophes a double
quotation mark; white space is a single space.

**Label.** ``positive`` if the mean rating is greater than 0, ``negative`` if it is less; sentences rated 0 are dropped.

**Selection and splits.** Of sentences with the same words the first is kept. The sha256 of the words decides: 10 %
valid, 10 % test, the rest train. Then sentences of valid that are near duplicates of one of test (see ``duplicates``),
and sentences of train that are near duplicates of one of either, are dropped. The order is that of the sha256.

**Result.** The 10,605 sentences of vaderSentiment 3.3.2 give 10,564: 8,410 train, 1,090 valid, 1,064 test.
"""

import math
import unicodedata
from collections.abc import Callable
from pathlib import Path

from .duplicates import disjoint_splits
from .errors import DataError
from .records import Example, key

RULES = 1
"""Version of these rules; raise it with every change that alters the texts, and cached sets are derived anew."""

HELD_OUT_PERCENT = 10

_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def clean(text: str) -> str:
    """The text of a sentence as it is kept."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_QUOTES).replace("''", '"').split())


def read_ratings(file: Path) -> list[tuple[float, str]]:
    """The mean ratings and the sentences as they stand in the file.

    Raises
    ------
    DataError
        If the file is not as expected.
    """
    found = []
    place = file.name
    try:
        for number, line in enumerate(file.read_text("utf8").split("\n"), 1):
            place = f"{file.name} line {number}"
            if line.strip():
                _, rating, text = line.split("\t")
                if not math.isfinite(float(rating)):
                    raise ValueError(f"the rating {rating}")
                found.append((float(rating), text))
    except ValueError as error:  # not UTF-8, no number, or more or fewer columns
        raise DataError(f"{place} is not the expected number, tab, rating, tab, sentence: {error}") from error
    return found


def derive(file: Path, report: Callable[[str], None] = lambda step: None) -> dict[str, list[Example]]:
    """The labelled sentences from the file of ratings.

    Parameters
    ----------
    file : Path
        The text file.
    report : callable
        Told in a few words what is being done.

    Returns
    -------
    dict
        Lists of examples under ``"train"``, ``"valid"`` and ``"test"``.

    Raises
    ------
    DataError
        If the file is not the one expected, or a split comes out empty.
    """
    report("reading sentences")
    kept: dict[str, Example] = {}
    for rating, text in read_ratings(file):
        if rating and key(text):
            kept.setdefault(key(text), Example(clean(text), "positive" if rating > 0 else "negative"))
    splits = disjoint_splits(kept.values(), HELD_OUT_PERCENT, by=lambda e: e.text, text=lambda e: e.text)
    if empty := [name for name, examples in splits.items() if not examples]:
        raise DataError(f"{file.name} gives no sentence for {', '.join(empty)}: these are not those expected")
    return splits
