"""A parallel corpus: pairs of sentences in two languages, in three splits, with a fingerprint of the whole."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .errors import DataError

SPLITS = ("train", "valid", "test")


class Pair(NamedTuple):
    """One sentence and its translation."""

    source: str
    target: str


def fingerprint(splits: Mapping[str, Iterable[Pair]]) -> str:
    """sha256 of the text itself: of the UTF-8 lines ``split TAB source TAB target`` in order.

    It depends on the pairs alone, not on how they are stored, so the same data has the same fingerprint in
    every file format and on every machine.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        for source, target in splits[split]:
            digest.update(f"{split}\t{source}\t{target}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class ParallelCorpus:
    """Pairs of sentences for translation, in three splits.

    Attributes
    ----------
    name : str
        The name of the corpus, followed by what was done to it, if anything: ``"bible (at most 12 words)"``.
    train, valid, test : list of Pair
        The pairs. Both sides are in Unicode normal form C, stripped, and not empty.
    origin : str
        Where they came from: ``"package"`` or ``"directory"``.
    fingerprint : str
        sha256 of the pairs, see ``fingerprint()`` of this module; it goes into every result record.
    licence, citation : str
        Terms of the text, and whom to cite.
    source_language, target_language : str
        ISO 639-1 codes.
    """

    name: str
    train: list[Pair] = field(repr=False)
    valid: list[Pair] = field(repr=False)
    test: list[Pair] = field(repr=False)
    origin: str
    fingerprint: str
    licence: str = ""
    citation: str = ""
    source_language: str = "de"
    target_language: str = "en"

    @property
    def splits(self) -> dict[str, list[Pair]]:
        """The three splits by name, in the order train, valid, test."""
        return {split: getattr(self, split) for split in SPLITS}

    def keep(self, condition: Callable[[Pair], bool], label: str) -> "ParallelCorpus":
        """The same corpus with only those pairs, in each split, for which ``condition(pair)`` holds.

        Parameters
        ----------
        condition : callable
            Called with each pair.
        label : str
            What was kept, in a few words; it is appended to the name in parentheses.

        Returns
        -------
        ParallelCorpus
            Its fingerprint is that of the pairs kept.

        Raises
        ------
        DataError
            If a split would be left empty.
        """
        kept = {split: [pair for pair in pairs if condition(pair)] for split, pairs in self.splits.items()}
        empty = [split for split, pairs in kept.items() if not pairs]
        if empty:
            raise DataError(
                f"no pair of {self.name} is left in {', '.join(empty)} after keeping those with {label}; "
                "choose a weaker condition"
            )
        return replace(self, name=f"{self.name} ({label})", fingerprint=fingerprint(kept), **kept)

    def short(self, max_words: int) -> "ParallelCorpus":
        """The same corpus with only the pairs whose sides both have at most `max_words` words.

        Words are what white space separates. The limit applies to each split, the test set included: say so
        wherever a score on it is reported (the name of the corpus does).

        Raises
        ------
        ValueError
            If `max_words` is not a positive integer.
        DataError
            If a split would be left empty.
        """
        if not isinstance(max_words, int) or max_words < 1:
            raise ValueError(f"max_words must be a positive integer, not {max_words!r}")
        return self.keep(
            lambda pair: len(pair.source.split()) <= max_words and len(pair.target.split()) <= max_words,
            f"at most {max_words} words",
        )

    def summary(self) -> str:
        """Counts of pairs and of words (separated by white space), one line a split, below the name."""
        lines = [
            f"{self.name}: {self.source_language} to {self.target_language}, from a {self.origin}, "
            f"sha256 {self.fingerprint[:12]}"
        ]
        for split, pairs in self.splits.items():
            source = sum(len(pair.source.split()) for pair in pairs)
            target = sum(len(pair.target.split()) for pair in pairs)
            lines.append(
                f"  {split:<5} {len(pairs):>7,} pairs  {source:>9,} words {self.source_language}"
                f"  {target:>9,} words {self.target_language}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()
