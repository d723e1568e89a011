"""Corpora of one language: documents for language modelling, and labelled texts for classification."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from .errors import DataError
from .records import SPLITS, SplitCorpus


class Counts(NamedTuple):
    """The size of a text in units that do not depend on a tokeniser.

    How many documents there are; words, which white space separates; and bytes, of the UTF-8 text. The ends of
    documents are no bytes: whoever charges a model for predicting them adds the number of documents.
    """

    documents: int
    words: int
    bytes: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Counts":
        """The counts of some texts.

        >>> Counts.of(["Zwei Häuser.", "Drei."])
        Counts(documents=2, words=3, bytes=18)
        """
        documents = words = size = 0
        for text in texts:
            documents, words, size = documents + 1, words + len(text.split()), size + len(text.encode())
        return cls(documents, words, size)


@dataclass(frozen=True)
class TextCorpus(SplitCorpus):
    """Documents for language modelling, in three splits.

    Attributes
    ----------
    name : str
        The name of the corpus, followed by what was done to it, if anything.
    train, valid, test : list of str
        The documents: in Unicode normal form C, each run of white space (ends of lines too) replaced by one space,
        not empty. So ``tokenizer.decode(tokenizer.encode(document)) == document``, and perplexities per word and
        per byte can be computed from the losses of tokens and ``counts()``.
    origin : str
        Where they came from: ``"package"`` or ``"directory"``.
    fingerprint : str
        sha256 of the documents, see ``fingerprint()``; it goes into every result record.
    licence, citation : str
        Terms of the text, and whom to cite.
    """

    noun: ClassVar[str] = "document"

    def counts(self, split: str) -> Counts:
        """How many documents, words and UTF-8 bytes a split has.

        Raises
        ------
        ValueError
            If there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
        return Counts.of(self.splits[split])

    def summary(self) -> str:
        """Counts of documents, words and bytes, one line a split, below the name."""
        lines = [f"{self.name}: text, from a {self.origin}, sha256 {self.fingerprint[:12]}"]
        for split in SPLITS:
            n = self.counts(split)
            lines.append(f"  {split:<5} {n.documents:>7,} documents  {n.words:>9,} words  {n.bytes:>10,} bytes")
        return "\n".join(lines)


@dataclass(frozen=True)
class LabelledCorpus(SplitCorpus):
    """Texts with one label each, for classification, in three splits.

    Attributes
    ----------
    name : str
        The name of the corpus, followed by what was done to it, if anything.
    train, valid, test : list of Example
        The texts, in Unicode normal form C with runs of white space replaced by one space, and their labels.
    origin : str
        Where they came from: ``"package"`` or ``"directory"``.
    fingerprint : str
        sha256 of the texts and labels, see ``fingerprint()``; it goes into every result record.
    licence, citation : str
        Terms of the text, and whom to cite.
    labels : list of str
        The classes, in the order in which a model numbers them: class ``i`` is ``labels[i]``.
    """

    labels: list[str] = field(kw_only=True)

    noun: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        known = set(self.labels)
        for split, examples in self.splits.items():
            if strange := sorted({example.label for example in examples} - known):
                raise DataError(
                    f"{split} of {self.name} has the label {strange[0]!r}, which is not among its classes "
                    f"{', '.join(self.labels)}: give training texts with this label, or leave it out"
                )

    def counts(self, split: str) -> dict[str, int]:
        """How many texts of a split have each label, in the order of ``labels``.

        Raises
        ------
        ValueError
            If there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
        found = Counter(example.label for example in self.splits[split])
        return {label: found[label] for label in self.labels}

    def summary(self) -> str:
        """Counts of texts and words and the share of the commonest class, one line a split, below the name."""
        lines = [
            f"{self.name}: {len(self.labels)} classes, from a {self.origin}, sha256 {self.fingerprint[:12]}",
            f"  classes: {', '.join(self.labels)}",
        ]
        for split, examples in self.splits.items():
            words = Counts.of(example.text for example in examples).words
            label, count = max(self.counts(split).items(), key=lambda item: item[1])
            share = f"  {100 * count / len(examples):5.1f} % {label}" if examples else ""
            lines.append(f"  {split:<5} {len(examples):>7,} texts  {words:>9,} words{share}")
        return "\n".join(lines)
