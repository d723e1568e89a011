"""What a corpus is made of: records in three splits, how they are fingerprinted, and how a hash splits them."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

from .errors import DataError

SPLITS = ("train", "valid", "test")
_WORD = re.compile(r"\w+(?:'\w+)*")


class Pair(NamedTuple):
    """One sentence and its translation."""

    source: str
    target: str


class Example(NamedTuple):
    """One text and its label, which is one of the ``labels`` of its corpus."""

    text: str
    label: str


Item = str | Pair | Example
"""What a split is a list of: a document is a plain text."""


def key(text: str) -> str:
    """A text without regard to case and punctuation: what tells whether two texts are the same."""
    return " ".join(_WORD.findall(text.casefold()))


def percentile(text: str) -> float:
    """A number in [0, 100) drawn by the sha256 of the text's ``key()``: what decides in which split it lies.

    It depends on the text alone. So a text does not move when others are added, and texts that differ in case or
    punctuation only are in the same split.
    """
    return int.from_bytes(hashlib.sha256(key(text).encode()).digest()[:8]) / 2**64 * 100


def fingerprint(splits: Mapping[str, Iterable[Item]]) -> str:
    """sha256 of the text itself: of one UTF-8 line a record, in order.

    For a pair the line is ``split TAB source TAB target``; for a document and for a labelled text, which may contain
    anything, the JSON list ``["split", text]`` or ``["split", text, label]``. It depends on the records alone, not on
    how they are stored, so the same data has the same fingerprint in every file format and on every machine.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for record in splits[split]:
            if isinstance(record, str | Example):
                digest.update(line(split, record))
            else:
                source, target = record
                digest.update(f"{split}\t{source}\t{target}\n".encode())
    return digest.hexdigest()


def line(split: str, record: Item) -> bytes:
    """A record as a line of JSON, the name of its split first."""
    fields = (record,) if isinstance(record, str) else record
    return (json.dumps([split, *fields], ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class SplitCorpus:
    """What all corpora have: records in three splits, a fingerprint, terms and a citation.

    Attributes
    ----------
    name : str
        The name of the corpus, followed by what was done to it, if anything: ``"bible (at most 12 words)"``.
    train, valid, test : list
        The records.
    origin : str
        Where they came from: ``"package"`` or ``"directory"``.
    fingerprint : str
        sha256 of the records, see ``fingerprint()``; it goes into every result record.
    licence, citation : str
        Terms of the text, and whom to cite.
    """

    name: str
    train: list[Any] = field(repr=False)
    valid: list[Any] = field(repr=False)
    test: list[Any] = field(repr=False)
    origin: str
    fingerprint: str
    licence: str = ""
    citation: str = ""

    noun: ClassVar[str] = "record"

    @property
    def splits(self) -> dict[str, list[Any]]:
        """The three splits by name, in the order train, valid, test."""
        return {split: getattr(self, split) for split in SPLITS}

    def keep(self, condition: Callable[[Any], bool], label: str) -> Self:
        """The same corpus with only those records, in each split, for which ``condition(record)`` holds.

        Parameters
        ----------
        condition : callable
            Called with each record.
        label : str
            What was kept, in a few words; it is appended to the name in parentheses.

        Returns
        -------
        SplitCorpus
            Of the same kind. Its fingerprint is that of the records kept.

        Raises
        ------
        DataError
            If a split that holds something would be left empty.
        """
        kept = {split: [record for record in records if condition(record)] for split, records in self.splits.items()}
        empty = [split for split, records in kept.items() if self.splits[split] and not records]
        if empty:
            raise DataError(
                f"no {self.noun} of {self.name} is left in {', '.join(empty)} after keeping those with {label}; "
                "choose a weaker condition"
            )
        return replace(self, name=f"{self.name} ({label})", fingerprint=fingerprint(kept), **kept)

    def summary(self) -> str:
        """Counts, one line a split, below the name."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.summary()
