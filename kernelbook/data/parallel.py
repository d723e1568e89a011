"""A parallel corpus: pairs of sentences in two languages, in three splits, with a fingerprint of the whole."""

from dataclasses import dataclass
from typing import ClassVar

from .records import SPLITS, Pair, SplitCorpus, fingerprint

__all__ = ["SPLITS", "Pair", "ParallelCorpus", "fingerprint"]


@dataclass(frozen=True)
class ParallelCorpus(SplitCorpus):
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
        sha256 of the pairs, see ``fingerprint()``; it goes into every result record.
    licence, citation : str
        Terms of the text, and whom to cite.
    source_language, target_language : str
        As the names of the files end, usually ISO 639-1 codes.
    """

    source_language: str = "de"
    target_language: str = "en"

    noun: ClassVar[str] = "pair"

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
