r"""Texts that occur twice: whether what a model is tested on was in its training text.

Two texts are the same (*exact*) if they have the same words, without regard to case and punctuation. They are *near*
duplicates if the sets :math:`A` and :math:`B` of their sequences of three words overlap by half,

.. math:: \frac{|A\cap B|}{|A\cup B|}\ge\frac12 .

A text of fewer than three words has one sequence, the whole. The measure is that of A. Broder, "On the resemblance and
containment of documents", Compression and Complexity of Sequences 1997, computed exactly.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from .records import Example, Item, Pair, SplitCorpus, key, percentile

Record = TypeVar("Record")

SEQUENCE = 3
NEAR = 0.5


class Leakage(NamedTuple):
    """How much of a held-out split also occurs in the training split.

    How many texts the held-out split has; how many of them are exactly a training text; and how many are near one,
    the exact ones among them.
    """

    texts: int
    exact: int
    near: int


def text_of(record: Item) -> str:
    """The text that a record is judged by: of a pair, the target sentence."""
    if isinstance(record, Pair):
        return record.target
    return record.text if isinstance(record, Example) else record


def sequences(text: str) -> frozenset[str]:
    """The sequences of three words in a text.

    >>> sorted(sequences("So it was, and so it was."))
    ['and so it', 'it was and', 'so it was', 'was and so']
    """
    words = key(text).split()
    return frozenset(" ".join(words[i : i + SEQUENCE]) for i in range(max(1, len(words) - SEQUENCE + 1)))


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The pairs ``(i, j)`` for which ``texts[i]`` and ``others[j]`` are near duplicates, in the order of ``i``."""
    sets = [sequences(text) for text in others]
    where: dict[str, list[int]] = defaultdict(list)
    for j, found in enumerate(sets):
        for sequence in found:
            where[sequence].append(j)
    for i, text in enumerate(texts):
        mine = sequences(text)
        common = Counter(j for sequence in mine for j in where.get(sequence, ()))
        for j, count in sorted(common.items()):
            if count >= NEAR * (len(mine) + len(sets[j]) - count):
                yield i, j


def disjoint_splits(
    records: Iterable[Record], percent: float, *, by: Callable[[Record], str], text: Callable[[Record], str]
) -> dict[str, list[Record]]:
    """Train, valid and test, decided by a hash, without near duplicates across splits, in the order of the hash.

    Parameters
    ----------
    records : iterable
        What is to be split.
    percent : float
        The share of valid, and of test.
    by : callable
        ``by(record)`` is what is hashed, see ``records.percentile()``.
    text : callable
        ``text(record)`` is what is compared.

    Returns
    -------
    dict
        Texts of valid that are near duplicates of one of test, and texts of train that are near duplicates of one of
        either, are left out.
    """
    splits: dict[str, list[Record]] = {"train": [], "valid": [], "test": []}
    for place, record in sorted((percentile(by(record)), record) for record in records):
        splits["valid" if place < percent else "test" if place < 2 * percent else "train"].append(record)

    def without(kept: list[Record], others: list[Record]) -> list[Record]:
        near = {i for i, _ in near_duplicates([text(record) for record in kept], [text(record) for record in others])}
        return [record for i, record in enumerate(kept) if i not in near]

    splits["valid"] = without(splits["valid"], splits["test"])
    splits["train"] = without(splits["train"], splits["valid"] + splits["test"])
    return splits


def leakage(corpus: SplitCorpus) -> dict[str, Leakage]:
    """How many texts of valid and test also occur in train, for each corpus.

    Returns
    -------
    dict of Leakage
        Under ``"valid"`` and ``"test"``. Of pairs, the target sentences are compared.
    """
    train = [text_of(record) for record in corpus.train]
    known = {key(text) for text in train}
    found = {}
    for split in ("valid", "test"):
        texts = [text_of(record) for record in corpus.splits[split]]
        exact = {j for j, text in enumerate(texts) if key(text) in known}
        near = {j for _, j in near_duplicates(train, texts)} | exact
        found[split] = Leakage(len(texts), len(exact), len(near))
    return found
