"""Evaluation: translations and their BLEU, perplexity, accuracy, and how sure their means over seeds are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from .decoding import beam as beam_search
from .decoding import greedy
from .models import Transformer
from .results import AttentionSample

if TYPE_CHECKING:
    from .data import Pair, Tokenizer

__all__ = ["Bleu", "bleu", "baselines", "accuracy", "perplexity", "bits_per_byte", "Interval", "mean_interval",
           "paired_difference", "translate", "attention_sample"]


@dataclass(frozen=True)
class Bleu:
    """A corpus BLEU, from 0 to 100, with the signature that says how it was computed."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """Corpus BLEU by sacrebleu at its defaults: mixed case, 13a tokenisation, exponential smoothing.

    Parameters
    ----------
    hypotheses, references : sequence of str
        Plain text, as many of the one as of the other.

    Returns
    -------
    Bleu

    Raises
    ------
    ValueError
        If their numbers differ, or there are none.

    References
    ----------
    Papineni et al. 2002; Post 2018.
    """
    from sacrebleu.metrics import BLEU

    if len(hypotheses) != len(references) or not references:
        raise ValueError("BLEU compares as many hypotheses as references, at least one; "
                         f"got {len(hypotheses)} and {len(references)}")
    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Bleu(round(score, 4), str(metric.get_signature()))


def baselines(train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, float]:
    """BLEU of two systems that know nothing: copying the source, and the most frequent target sentence.

    Parameters
    ----------
    train, test : sequence of Pair
        The most frequent sentence is that of ``train``; of several, the one that comes first.

    Returns
    -------
    dict
        ``copy_source`` and ``most_frequent_sentence``, BLEU on ``test``.
    """
    references = [pair.target for pair in test]
    frequent = Counter(pair.target for pair in train).most_common(1)[0][0]
    return {"copy_source": bleu([pair.source for pair in test], references).score,
            "most_frequent_sentence": bleu([frequent] * len(test), references).score}


def accuracy(predicted: Sequence[Any], expected: Sequence[Any]) -> float:
    r"""The share that is right, :math:`\frac1n\#\{i:\hat y_i=y_i\}`, from 0 to 1.

    Parameters
    ----------
    predicted, expected : sequences
        As many of the one as of the other; or tensors of the same shape.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If their numbers differ, or there are none.
    """
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else (len(x),) for x in (predicted, expected)]
    predicted, expected = (x.flatten().tolist() if isinstance(x, torch.Tensor) else list(x)
                           for x in (predicted, expected))
    if shapes[0] != shapes[1] or not expected:
        raise ValueError("accuracy compares as many predictions as true answers, at least one; "
                         f"got shapes {shapes[0]} and {shapes[1]}")
    return sum(p == y for p, y in zip(predicted, expected, strict=True)) / len(expected)


def perplexity(nats: float, count: int) -> float:
    r"""Perplexity per unit, :math:`\exp(\text{nats}/\text{count})`: per token, or per word.

    Models with different vocabularies cut a text into different numbers of tokens, so only their perplexities per
    word (or per byte) compare: the same total, divided by the number of words of the *text*.

    Parameters
    ----------
    nats : float
        Minus the logarithm of the probability of the whole text, in nats: a sum over all its tokens.
    count : int
        Number of tokens, or of words, that were predicted.

    Returns
    -------
    float
        Infinite where it exceeds the largest number.

    Raises
    ------
    ValueError
        If ``count`` is below 1, or ``nats`` is negative or not a number.
    """
    each = _each(nats, count)
    return math.exp(each) if each < 709 else math.inf


def bits_per_byte(nats: float, count: int) -> float:
    r"""Bits per byte, :math:`\text{nats}/(\text{count}\cdot\ln2)`.

    A text compressed by an ideal coder with the model's probabilities takes so many bits for each of its bytes.

    Parameters
    ----------
    nats : float
        Minus the logarithm of the probability of the whole text, in nats: a sum over all its tokens.
    count : int
        Number of bytes of the text, in UTF-8.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If ``count`` is below 1, or ``nats`` is negative or not a number.
    """
    return _each(nats, count) / math.log(2)


def _each(nats: float, count: int) -> float:
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}: nothing was predicted")
    if not nats >= 0:
        raise ValueError(f"nats, minus the logarithm of a probability, must be a number from 0 on, not {nats}")
    return nats / count


@dataclass(frozen=True)
class Interval:
    """A mean over repetitions, and a confidence interval of it where there are at least two.

    Attributes
    ----------
    mean : float
    low, high : float or None
        The ends of the interval; None where ``n`` is 1, since one repetition says nothing of how they vary.
    n : int
        Number of repetitions.
    level : float
        Of confidence, say 0.95.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    level: float

    @property
    def half_width(self) -> float | None:
        """Half the length of the interval, or None."""
        return None if self.low is None else (self.high - self.low) / 2

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.4g} (n = 1, no interval)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n}, {100 * self.level:g} %)"


def mean_interval(values: Sequence[float] | Mapping[Any, float], level: float = 0.95) -> Interval:
    r"""The mean of a few independent repetitions, and Student's interval of it.

    .. math:: \bar v\pm t_{n-1,(1+\text{level})/2}\,\frac s{\sqrt n},\qquad
              s^2=\frac1{n-1}\sum_i(v_i-\bar v)^2 .

    It holds the expectation with probability ``level`` where the values are normal; nearly so where they are not far
    from it.  Over seeds it speaks of other seeds of the same training and test data, and of nothing else.

    Parameters
    ----------
    values : sequence of float, or mapping of float
        One a repetition, or by seed.
    level : float
        Of confidence, between 0 and 1.

    Returns
    -------
    Interval
        Without ends if there is one value only.

    Raises
    ------
    ValueError
        If there are no values, one is not finite, or ``level`` is not between 0 and 1.

    References
    ----------
    Student 1908.
    """
    found = [float(v) for v in (values.values() if isinstance(values, Mapping) else values)]
    if not found:
        raise ValueError("a mean needs at least one value; got none")
    if bad := [v for v in found if not math.isfinite(v)]:
        raise ValueError(f"values must be finite, but {len(bad)} of {len(found)} are not, such as {bad[0]}; leave out "
                         "the runs that failed, and say how many they were")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, as in 0.95, not {level}")
    n, mean = len(found), fmean(found)
    if n == 1:
        return Interval(mean, None, None, n, level)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + level) / 2)) * stdev(found) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, level)


def paired_difference(values: Sequence[float] | Mapping[Any, float], reference: Sequence[float] | Mapping[Any, float],
                      level: float = 0.95) -> Interval:
    r"""The mean of ``values - reference`` over the same seeds, and Student's interval of it.

    It is :func:`mean_interval` of the differences :math:`v_i-r_i`.  What a seed does to both runs alike (order of the
    batches, first weights) cancels, so the interval is often shorter than those of the two means suggest.

    Parameters
    ----------
    values, reference : sequences of float, or mappings of float
        Paired by position, or by seed; both of one kind.
    level : float
        Of confidence, between 0 and 1.

    Returns
    -------
    Interval
        Without ends if there is one pair only.

    Raises
    ------
    ValueError
        If a value has no partner; and as in :func:`mean_interval`.
    """
    if isinstance(values, Mapping) != isinstance(reference, Mapping):
        raise ValueError("values and reference must both be sequences, paired by position, or both be mappings, paired "
                         "by seed")
    if isinstance(values, Mapping):
        if alone := sorted(map(str, values.keys() ^ reference.keys())):
            raise ValueError(f"seeds must have a value on both sides, but these have only one: {', '.join(alone)}; "
                             "train what is missing, or compare the seeds that both have")
        pairs = [(values[seed], reference[seed]) for seed in values]
    elif len(values) != len(reference):
        raise ValueError(f"values and reference must be as many, but are {len(values)} and {len(reference)}")
    else:
        pairs = list(zip(values, reference, strict=True))
    return mean_interval([float(v) - float(r) for v, r in pairs], level)


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    beam: int = 1,
    length_penalty: float = 1.0,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Translate sentences by greedy decoding or beam search, in batches of similar length.

    A translation is cut off at one and a half times its source's tokens, plus 10.

    Parameters
    ----------
    model : Transformer
        An encoder-decoder.
    tokenizer : Tokenizer
        The one it was trained with.
    sentences : sequence of str
        Plain text; an empty one is translated by an empty one.
    beam : int
        Width of the beam; 1 is greedy decoding.
    length_penalty : float
        As in :func:`kernelbook.decoding.beam`; without effect where ``beam`` is 1.
    batch_tokens : int
        Padded source tokens a batch; a sentence of more is translated whole, in a batch of its own.
    progress : callable, optional
        Called after each batch with the number of sentences done so far, and of all.

    Returns
    -------
    list of str
        In the order of ``sentences``.

    Raises
    ------
    ValueError
        If ``beam`` or ``batch_tokens`` is below 1, or ``length_penalty`` is negative.
    """
    from .data import pad, token_budget_batches

    if beam < 1 or batch_tokens < 1:
        raise ValueError(f"beam and batch_tokens must be at least 1, but are {beam} and {batch_tokens}")
    search = greedy if beam == 1 else partial(beam_search, width=beam, length_penalty=length_penalty)
    sources = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch([s.strip() for s in sentences])]
    todo = [i for i, ids in enumerate(sources) if len(ids) > 1]
    short = [i for i in todo if len(sources[i]) <= batch_tokens]
    batches = [[short[j] for j in batch]
               for batch in token_budget_batches([len(sources[i]) for i in short], batch_tokens, shuffle=False)]
    batches += [[i] for i in todo if len(sources[i]) > batch_tokens]
    out, done = [""] * len(sources), len(sources) - len(todo)
    device = next(model.parameters()).device
    for rows in batches:
        source = pad([sources[i] for i in rows], tokenizer.pad_id).to(device)
        found = search(model, source, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
                       max_length=[len(sources[i]) * 3 // 2 + 10 for i in rows])
        for i, ids in zip(rows, found, strict=True):
            out[i] = tokenizer.decode(ids)
        if progress:
            done += len(rows)
            progress(done, len(sources))
    return out


@torch.no_grad()
def attention_sample(
    model: Transformer, tokenizer: Tokenizer, source: str, target: str, *, record: str
) -> AttentionSample:
    """Queries and keys of the attention from a target sentence to its source, teacher-forced.

    Parameters
    ----------
    model : Transformer
        An encoder-decoder.
    tokenizer : Tokenizer
        The one it was trained with.
    source, target : str
        A sentence and a translation of it.
    record : str
        Name of the run that trained the model.

    Returns
    -------
    AttentionSample
    """
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        s = torch.tensor([[*tokenizer.encode(source), tokenizer.eos_id]], device=device)
        t = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(target)]], device=device)
        heads = model.record_heads(lambda: model(s, t))
    finally:
        model.train(was_training)
    return AttentionSample(source_tokens=[*tokenizer.tokens(source), "⟨end⟩"],
                           target_tokens=["⟨begin⟩", *tokenizer.tokens(target)],
                           queries=torch.stack([q[0] for q, _, _ in heads]),
                           keys=torch.stack([k[0] for _, k, _ in heads]),
                           source=source, target=target, kernel=model.config.kernel, record=record)
