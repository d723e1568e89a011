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
from .decoding import evaluating, greedy
from .models import Transformer
from .results import AttentionSample

if TYPE_CHECKING:
    from .data import Pair, Tokenizer

__all__ = ["Score", "bleu", "chrf", "baselines", "accuracy", "perplexity", "bits_per_byte", "Interval", "mean_interval",
           "paired_difference", "holm", "translate", "attention_sample"]


@dataclass(frozen=True)
class Score:
    """A score of translations, from 0 to 100, with the signature that says how it was computed."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus BLEU by sacrebleu at its defaults: mixed case, 13a tokenisation, exponential smoothing.

    Parameters
    ----------
    hypotheses, references : sequence of str
        Plain text, as many of the one as of the other.

    Returns
    -------
    Score

    Raises
    ------
    ValueError
        If their numbers differ, or there are none.

    References
    ----------
    Papineni et al. 2002; Post 2018.
    """
    from sacrebleu.metrics import BLEU

    return _score(BLEU(), hypotheses, references)


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus chrF by sacrebleu at its defaults: F2 of the character n-grams up to 6, without spaces.

    It asks less than BLEU of a model that gets words nearly right, and does not depend on where words end.

    Parameters
    ----------
    hypotheses, references : sequence of str
        Plain text, as many of the one as of the other.

    Returns
    -------
    Score

    Raises
    ------
    ValueError
        If their numbers differ, or there are none.

    References
    ----------
    Popović 2015; Post 2018.
    """
    from sacrebleu.metrics import CHRF

    return _score(CHRF(), hypotheses, references)


def _score(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{type(metric).__name__} compares as many hypotheses as references, at least one; "
                         f"got {len(hypotheses)} and {len(references)}")
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Score(round(score, 4), str(metric.get_signature()))


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
    p_value : float or None
        Of Student's two-sided test that the expectation is 0; None where ``n`` is 1.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    level: float
    p_value: float | None = None

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
    from scipy.special import stdtr, stdtrit

    error = stdev(found) / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * error
    t = abs(mean) / error if error else math.inf if mean else 0.0     # equal values differ from 0, or are 0
    return Interval(mean, mean - half, mean + half, n, level, 2 * float(stdtr(n - 1, -t)))


def paired_difference(values: Sequence[float] | Mapping[Any, float], reference: Sequence[float] | Mapping[Any, float],
                      level: float = 0.95) -> Interval:
    r"""The mean of ``values - reference`` over the same seeds, and Student's interval of it.

    It is :func:`mean_interval` of the differences :math:`v_i-r_i`.  What a seed does to both runs alike (order of the
    batches, first weights) cancels, so the interval is often shorter than those of the two means suggest.

    Parameters
    ----------
    values, reference : sequence or mapping
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


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    r"""P-values of several tests, raised so that one threshold holds for all of them together.

    .. math:: \tilde p_{(i)}=\max_{j\le i}\min\{1,(h-j+1)\,p_{(j)}\},\qquad p_{(1)}\le\dots\le p_{(h)} .

    Whatever the tests have to do with each other, the probability that any true hypothesis gets an adjusted value of at
    most :math:`\alpha` is at most :math:`\alpha`.

    Parameters
    ----------
    p_values : mapping
        By the name of the test.

    Returns
    -------
    dict
        The adjusted values, under the same names, in the same order.

    Raises
    ------
    ValueError
        If one is not between 0 and 1.

    References
    ----------
    Holm 1979.
    """
    if bad := {name: p for name, p in p_values.items() if not 0 <= p <= 1}:
        raise ValueError(f"p-values are between 0 and 1, but {', '.join(f'{name}: {p}' for name, p in bad.items())}; "
                         "leave out what could not be tested")
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        adjusted[name] = least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
    return {name: adjusted[name] for name in p_values}


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
    model: Transformer,
    tokenizer: Tokenizer,
    source: str | Sequence[int],
    target: str | Sequence[int] | None = None,
    *,
    record: str,
    attention: str | None = None,
) -> AttentionSample:
    """Queries and keys of one of a model's attentions on a given text, teacher-forced.

    A text is framed as the tasks frame it: what is translated is followed by ``eos_id`` and its translation preceded
    by ``bos_id``; a text to classify is preceded by ``bos_id``; one to continue is preceded by ``eos_id``, which
    separates documents.  A list of token numbers is taken as it is.

    Self-attention goes from a text to itself.  A decoder's is causal, which the queries and keys alone do not say:
    its weights are ``weights(sample.queries, sample.keys, sample.kernel, causal=True)``.

    Parameters
    ----------
    model : Transformer
        Of any architecture.
    tokenizer : Tokenizer
        The one it was trained with.
    source : str or sequence of int
        What is translated, classified or continued.
    target : str or sequence of int, optional
        A translation of it, for an encoder-decoder; only ``attention="encoder"`` does without.
    record : str
        Name of the run that trained the model.
    attention : str, optional
        ``"cross"`` (from the target to the source), ``"decoder"`` or ``"encoder"`` (self-attention of a stack); by
        default ``"cross"`` if the model has both stacks, else the one it has.

    Returns
    -------
    AttentionSample
        ``target_tokens`` attend, ``source_tokens`` are attended to.

    Raises
    ------
    ValueError
        If the model has no such attention, a text is empty, or ``target`` is missing or out of place.
    """
    architecture = model.config.architecture
    if attention is None:
        attention = {"encoder-decoder": "cross", "decoder": "decoder", "classifier": "encoder"}[architecture]
    if architecture != "encoder-decoder" and target is not None:
        raise ValueError(f"target is a translation, for an encoder-decoder; this is a {architecture}")
    if architecture == "encoder-decoder" and target is None and attention != "encoder":
        raise ValueError(f"attention {attention!r} of an encoder-decoder needs a target, a translation of the source")

    def framed(text: str | Sequence[int], before: Sequence[int] = (), after: Sequence[int] = ()) -> list[int]:
        ids = list(text)
        if isinstance(text, str):
            found = tokenizer.encode(text)
            ids = [*before, *found, *after] if found else []
        if not ids:
            raise ValueError("there is no attention of an empty text; give a text with at least one token")
        return ids

    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    if architecture == "encoder-decoder":
        attended = framed(source, after=eos)
    else:
        attended = framed(source, bos if architecture == "classifier" else eos)
    attends = attended if target is None else framed(target, bos)
    device = next(model.parameters()).device
    s, t = torch.tensor([attended], device=device), torch.tensor([attends], device=device)
    with evaluating(model):
        if architecture != "encoder-decoder":
            heads = model.record_heads(lambda: model(s), attention)
        elif attention == "encoder":
            heads = model.record_heads(lambda: model.encode(s), attention)
        else:
            heads = model.record_heads(lambda: model(s, t), attention)
    texts = [source, source if target is None else target]
    if attention == "encoder":
        attends, texts = attended, [source, source]
    elif attention == "decoder":
        attended, texts = attends, [texts[1], texts[1]]
    named = {tokenizer.bos_id: "⟨begin⟩", tokenizer.eos_id: "⟨end⟩"}
    labels = [[named.get(i, piece) for i, piece in zip(ids, tokenizer.pieces(ids), strict=True)]
              for ids in (attended, attends)]
    plain = [text if isinstance(text, str) else tokenizer.decode(text) for text in texts]
    return AttentionSample(source_tokens=labels[0], target_tokens=labels[1],
                           queries=torch.stack([q[0] for q, _, _ in heads]),
                           keys=torch.stack([k[0] for _, k, _ in heads]),
                           source=plain[0], target=plain[1], kernel=model.config.kernel, record=record)
