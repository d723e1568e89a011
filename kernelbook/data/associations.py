r"""Which words of two languages translate each other, measured from aligned sentences: responses for a binary problem.

Every step is a count or a formula, so the same pairs give the same table on every machine.

**Words** (``words``): runs of letters, without regard to case (``ß`` becomes ``ss``).

**Counts.** :math:`n_a` and :math:`n_b` are the numbers of pairs in whose source sentence the word :math:`a` occurs, and
in whose target sentence the word :math:`b`; :math:`n_{ab}` those with both; :math:`n` all pairs. Were the two
independent, :math:`e_{ab}=n_an_b/n` pairs would be expected to have both.

**Association** (``Associations.scores``): the logarithm of observed over expected, shrunk by :math:`s` pretended
observations so that rare words cannot shout, and cut off where it is small:

.. math::
    z_{ab}=\log\frac{n_{ab}+s}{e_{ab}+s}\quad\text{if this is at least a threshold, else }0 .

With :math:`s=0` this is the pointwise mutual information.

**Selection** (``measure``). Of the words that occur in enough sentences, :math:`a` and :math:`b` are *partners* if each
is the other's strongest associate by the log-likelihood ratio of T. Dunning (Computational Linguistics 19, 1993) among
the words that occur together more often than expected, if :math:`2n_{ab}/(n_a+n_b)\ge\frac12`, and if their association
reaches the threshold. Those with the
largest ratio are kept; the i-th source word and the i-th target word of the table are partners.

::

    python -m kernelbook.data.associations results/word-associations-bible.json
    python -m kernelbook.data.associations FILE.json multi30k
"""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ..files import FileError, write_whole
from .parallel import Pair

_LETTERS = re.compile(r"[^\W\d_]+")

KIND = "word associations"
SHRINK, THRESHOLD = 5.0, 0.5
LEAST_SENTENCES, LEAST_OVERLAP = 20, 0.5


def words(text: str) -> list[str]:
    """The words of a text, without regard to case.

    >>> words("Laß uns 3 Stricke nehmen!")
    ['lass', 'uns', 'stricke', 'nehmen']
    """
    return _LETTERS.findall(text.casefold())


@dataclass(frozen=True)
class Associations:
    """Words of two languages, and how often they occur, alone and together.

    Attributes
    ----------
    source, target : list of str
        The words; ``source[i]`` and ``target[i]`` are partners.
    source_counts, target_counts : list of int
        In how many sentences each occurs.
    together : list of (int, int, int)
        Index of a source word, index of a target word, number of pairs with both: where the association reaches
        the threshold.
    pairs : int
        Number of sentence pairs.
    data : dict
        Corpus, origin, fingerprint, licence, citation.
    provenance : dict
        The command, and the versions it ran with.
    """

    source: list[str]
    target: list[str]
    source_counts: list[int]
    target_counts: list[int]
    together: list[tuple[int, int, int]]
    pairs: int
    data: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def scores(self) -> Float[NDArray, "n m"]:
        r"""The matrix of associations :math:`z_{ab}`; 0 where the association is below the threshold."""
        z = np.zeros((len(self.source), len(self.target)))
        for i, j, count in self.together:
            z[i, j] = log_ratio(count, self.source_counts[i], self.target_counts[j], self.pairs)
        return z

    def save(self, path: str | os.PathLike) -> Path:
        """Write the table as JSON, whole or not at all.

        Raises
        ------
        FileError
            If it cannot be written.
        """
        plain = {"kind": KIND} | asdict(self)
        # One line for each list and for each source word's companions: small, and still fit to be read and compared.
        rows = [[] for _ in self.source]
        for i, j, count in self.together:
            rows[i].append([j, count])
        plain["together"] = "ROWS"
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in plain.items())
        return write_whole(path, "{" + text.replace('"ROWS"', f"[\n{lines}]") + "}\n")


def load(path: str | os.PathLike) -> Associations:
    """Read a table that :meth:`Associations.save` wrote.

    Raises
    ------
    FileError
        If it is missing, damaged, or something else.
    """
    try:
        plain = json.loads(Path(path).read_text("utf8"))
        if plain.pop("kind") != KIND:
            raise ValueError(f"it is no {KIND!r}")
        plain["together"] = [(i, j, count) for i, row in enumerate(plain["together"]) for j, count in row]
        return Associations(**plain)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path} cannot be read as a table of word associations ({error}); make it anew with "
                        "`python -m kernelbook.data.associations FILE`") from error


def log_ratio(together: int, first: int, second: int, pairs: int, shrink: float = SHRINK) -> float:
    """The logarithm of observed over expected co-occurrences, shrunk; see the text of this module.

    >>> log_ratio(10, 10, 10, 1000) > log_ratio(2, 2, 2, 1000) > 0 > log_ratio(0, 100, 100, 1000)
    True
    """
    return math.log((together + shrink) / (first * second / pairs + shrink))


def likelihood_ratio(together: int, first: int, second: int, pairs: int) -> float:
    r"""Twice the logarithm of the likelihood ratio of dependence to independence, :math:`2\sum o\log(o/e)`.

    The sum runs over the four cells of the table "first word present or not, second word present or not".
    """
    observed = (together, first - together, second - together, pairs - first - second + together)
    expected = (first * second, first * (pairs - second), (pairs - first) * second, (pairs - first) * (pairs - second))
    return 2 * sum(o * math.log(o * pairs / e) for o, e in zip(observed, expected, strict=True) if o)


def measure(
    pairs: Iterable[Pair], *, size: int = 500, least_sentences: int = LEAST_SENTENCES,
    least_overlap: float = LEAST_OVERLAP, threshold: float = THRESHOLD,
) -> Associations:
    """Count words in sentence pairs, and keep the words of the clearest partners.

    Parameters
    ----------
    pairs : iterable of Pair
        Sentences and their translations.
    size : int
        How many pairs of partners to keep at most, those with the largest likelihood ratio.
    least_sentences : int
        In how many sentences a word has to occur.
    least_overlap : float
        The least Dice coefficient of partners.
    threshold : float
        The least association that is recorded.

    Returns
    -------
    Associations
        With the partners sorted by their source word.

    Raises
    ------
    ValueError
        If there are no partners.
    """
    sets = [(sorted(set(words(source))), sorted(set(words(target)))) for source, target in pairs]
    source = Counter(word for side, _ in sets for word in side)
    target = Counter(word for _, side in sets for word in side)
    both: Counter[tuple[str, str]] = Counter()
    for left, right in sets:
        right = [b for b in right if target[b] >= least_sentences]
        for a in left:
            if source[a] >= least_sentences:
                both.update((a, b) for b in right)
    n = len(sets)
    best_of_source: dict[str, tuple[float, str]] = {}
    best_of_target: dict[str, tuple[float, str]] = {}
    for (a, b), count in both.items():
        if count * n > source[a] * target[b]:
            ratio = likelihood_ratio(count, source[a], target[b], n)
            best_of_source[a] = max(best_of_source.get(a, (0.0, "")), (ratio, b))
            best_of_target[b] = max(best_of_target.get(b, (0.0, "")), (ratio, a))
    partners = [(ratio, a, b) for a, (ratio, b) in best_of_source.items()
                if best_of_target[b][1] == a and 2 * both[a, b] >= least_overlap * (source[a] + target[b])
                and log_ratio(both[a, b], source[a], target[b], n) >= threshold]
    if not partners:
        raise ValueError(f"{n} pairs of sentences have no two words that occur in at least {least_sentences} of them "
                         "and are each other's strongest associates; give more text, or ask for less")
    kept = sorted((a, b) for _, a, b in sorted(partners, reverse=True)[:size])
    left, right = [a for a, _ in kept], [b for _, b in kept]
    together = [(i, j, both[a, b]) for i, a in enumerate(left) for j, b in enumerate(right)
                if both[a, b] and log_ratio(both[a, b], source[a], target[b], n) >= threshold]
    return Associations(left, right, [source[a] for a in left], [target[b] for b in right], together, n)


def main(arguments: list[str]) -> None:
    """Measure the associations in the training pairs of a corpus, by default the Bible, and write them to a file."""
    from dataclasses import replace

    from ..results import provenance
    from .errors import DataError
    from .loading import load_translation

    if len(arguments) not in (1, 2):
        raise SystemExit("usage: python -m kernelbook.data.associations FILE.json [CORPUS]")
    made = provenance(command=f"python -m kernelbook.data.associations {' '.join(arguments)}")
    try:
        corpus = load_translation(*arguments[1:] or ["bible"])
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    table = replace(
        measure(corpus.train),
        data={"name": corpus.name, "split": "train", "origin": corpus.origin, "fingerprint": corpus.fingerprint,
              "licence": corpus.licence, "citation": corpus.citation},
        provenance={key: made[key] for key in ("date", "commit", "command", "versions")})
    path = table.save(arguments[0])
    print(f"{path}: {len(table.source)} pairs of words, {len(table.together):,} associations, "
          f"{path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
