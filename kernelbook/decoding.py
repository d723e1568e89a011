r"""Decoding: from a trained model's scores to sequences of tokens.

Translators search for a target :math:`y` of high probability :math:`p(y\mid x)=\prod_tp(y_t\mid y_{<t},x)`:
:func:`greedy` follows one hypothesis, :func:`beam` several.  Language models continue a text by :func:`sample`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .models import Transformer

__all__ = ["greedy", "beam", "Hypothesis", "sample", "probabilities"]


# ------------------------------------------------------------------------- search

@torch.no_grad()
def greedy(
    model: Transformer, source: Int[Tensor, "batch m"], *, bos_id: int, eos_id: int, max_length: int | Sequence[int],
    cache: bool = True
) -> list[list[int]]:
    r"""Greedy decoding: at every step the most probable next token, :math:`y_t=\arg\max_y p(y\mid y_{<t},x)`.

    Of several most probable tokens it takes the one with the least number.

    Parameters
    ----------
    model : Transformer
        An encoder-decoder; it is put in evaluation mode for the call.
    source : Tensor
        ``(batch, m)``, padded with the model's ``pad_id``.
    bos_id, eos_id : int
        The tokens that begin and end a target.
    max_length : int or sequence of int
        Number of tokens after which to stop all the same; for all targets, or for each.
    cache : bool
        Whether to keep the keys and values of earlier tokens; otherwise they are all computed anew for every token,
        with the same result.

    Returns
    -------
    list of list of int
        The target tokens of each source, without the ones that begin and end it.

    Raises
    ------
    ValueError
        If a ``max_length`` is below 1 or missing, or the model has no encoder or no decoder.
    """
    limits = _limits(max_length, source.shape[0])
    with evaluating(model):
        memory, hidden = model.encode(source)
        found = source.new_full((source.shape[0], 1 + max(limits, default=0)), eos_id)
        found[:, 0] = bos_id
        rows = torch.arange(source.shape[0], device=source.device)      # of the sequences that go on, and some more
        limit = torch.tensor(limits, device=source.device)
        kept = model.new_cache(memory, hidden) if cache else None
        for t in range(found.shape[1] - 1):
            if cache:
                last = model.decode(found[rows, t, None], cache=kept)
            else:
                last = model.decode(found[rows, :t + 1], memory[rows], hidden[rows])
            token = model.logits(last[:, -1]).argmax(-1)
            if t:
                token = token.masked_fill((found[rows, t] == eos_id) | (limit[rows] <= t), eos_id)
            found[rows, t + 1] = token
            on = ((token != eos_id) & (limit[rows] > t + 1)).nonzero()[:, 0]
            if len(on) == 0:
                break
            if 2 * len(on) <= len(rows):        # copying what was kept is worth it, and at most doubles the work
                rows = rows[on]
                if cache:
                    kept.select(on)
    return [_until(eos_id, row) for row in found[:, 1:].tolist()]


@dataclass(frozen=True)
class Hypothesis:
    """A target that a search found.

    Attributes
    ----------
    tokens : list of int
        Without the ones that begin and end it.
    log_probability : float
        Of the tokens and, if it is finished, of the one that ends it; in nats.
    score : float
        What it was ranked by: ``log_probability`` over a power of the number of tokens.
    finished : bool
        Whether it ends by itself; otherwise it was cut off.
    """

    tokens: list[int]
    log_probability: float
    score: float
    finished: bool


@torch.no_grad()
def beam(
    model: Transformer, source: Int[Tensor, "batch m"], *, bos_id: int, eos_id: int, max_length: int | Sequence[int],
    width: int = 4, length_penalty: float = 1.0, n_best: int | None = None, cache: bool = True
) -> list[list[int]] | list[list[Hypothesis]]:
    r"""Beam search: the best target among those whose beginnings were, at every length, among the most probable.

    Of all extensions of the unfinished hypotheses by one token, the ``width`` most probable are kept; those that end
    in ``eos_id`` are finished, the others go on.  Finished hypotheses :math:`y`, of any length, compete by

    .. math:: \operatorname{score}(y)=\frac{\log p(y\mid x)}{|y|^\alpha},

    with :math:`|y|` the number of tokens, ``eos_id`` among them, and :math:`\alpha` the ``length_penalty``: 0 ranks
    by probability, which favours short targets; 1 by the mean log-probability of a token.  A hypothesis that has
    ``max_length`` tokens without ``eos_id`` is cut off; it comes after all finished ones.

    The search of a sentence ends when nothing unfinished can win any more.  Log-probabilities only fall, so what is at
    :math:`\ell\leq0` now can reach no more than :math:`\ell/\text{max\_length}^\alpha`: once the best finished score
    (for ``n_best``, the last of the best) is at least this, going on would not change the result.

    A beam of width 1 is greedy decoding.  One that keeps every sequence is an exhaustive search, and finds the best
    target.  In between nothing is promised, not even a score of at least that of greedy decoding: what that would
    find may have a beginning that is not among the ``width`` most probable ones.

    Where probabilities are equal, the extension of the better hypothesis comes first, and then the token with the
    lower number; where scores are, the hypothesis that was finished first.

    Parameters
    ----------
    model : Transformer
        An encoder-decoder; it is put in evaluation mode for the call.
    source : Tensor
        ``(batch, m)``, padded with the model's ``pad_id``.
    bos_id, eos_id : int
        The tokens that begin and end a target.
    max_length : int or sequence of int
        Number of tokens after which to stop all the same; for all targets, or for each.
    width : int
        Number of hypotheses kept at every step, for each sentence.
    length_penalty : float
        The exponent :math:`\alpha`, at least 0.
    n_best : int, optional
        Return so many hypotheses of each sentence, at most ``width``, with their scores.
    cache : bool
        Whether to keep the keys and values of earlier tokens; otherwise they are all computed anew for every token,
        with the same result.

    Returns
    -------
    list of list of int, or list of list of Hypothesis
        The target tokens of each source, without the ones that begin and end it; with ``n_best``, the best hypotheses
        of each source, the best first.

    Raises
    ------
    ValueError
        If a ``max_length`` or ``width`` is below 1, ``n_best`` is not from 1 to ``width``, ``length_penalty`` is
        negative, or the model has no encoder or no decoder.
    FloatingPointError
        If a score of the model is not a number.

    References
    ----------
    Sutskever, Vinyals and Le 2014; the penalty as in fairseq, Ott et al. 2019.
    """
    limits, wanted = _limits(max_length, source.shape[0]), 1 if n_best is None else n_best
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    if not 1 <= wanted <= width:
        raise ValueError(f"n_best must be from 1 to width, which is {width}, not {n_best}; widen the beam")
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty must be a number from 0 on, not {length_penalty}")
    found: list[list[Hypothesis]] = [[] for _ in limits]

    def keep(of: Tensor, chosen: Tensor, finished: bool) -> None:
        """Note hypotheses of sentences; only the best ones wanted stay, those noted first where they are equal."""
        ids = torch.cat((paths[parent[chosen], 1:], token[chosen][:, None]), 1).tolist()
        for i, path, total in zip(of[chosen].tolist(), ids, value[chosen].tolist(), strict=True):
            tokens = path[:-1] if finished else path
            found[i].append(Hypothesis(tokens, total, total / t ** length_penalty, finished))
            found[i].sort(key=lambda h: (not h.finished, -h.score))
            del found[i][wanted:]

    with evaluating(model):
        memory, hidden = model.encode(source)
        kept = model.new_cache(memory, hidden) if cache else None
        # Of the unfinished hypotheses: sentence (in order), tokens, log-probability; the more probable ones first.
        sentence = torch.arange(source.shape[0], device=source.device)
        paths = source.new_full((source.shape[0], 1), bos_id)
        totals: Tensor | float = 0.0
        for t in range(1, 1 + max(limits, default=0)):
            if cache:
                last = model.decode(paths[:, -1:], cache=kept)
            else:
                last = model.decode(paths, memory[sentence], hidden[sentence])
            value, parent, token, sentences = _extensions(_numbers(model.logits(last[:, -1])).log_softmax(-1) + totals,
                                                          sentence, width)
            of = sentences[:, None].expand_as(token)
            ends = (token == eos_id) & (value > -math.inf)
            on = (token != eos_id) & (value > -math.inf)
            keep(of, ends, finished=True)
            most = value.masked_fill(~on, -math.inf).amax(-1).tolist()
            at_limit = [limits[i] == t for i in sentences.tolist()]
            over = [len(found[i]) == wanted and found[i][-1].score >= total / limits[i] ** length_penalty
                    for i, total in zip(sentences.tolist(), most, strict=True)]
            if any(at_limit):
                keep(of, on & torch.tensor(at_limit, device=on.device)[:, None], finished=False)
            on &= ~torch.tensor([a or b for a, b in zip(at_limit, over, strict=True)], device=on.device)[:, None]
            if not on.any():
                break
            rows, sentence, totals = parent[on], of[on], value[on][:, None]
            paths = torch.cat((paths[rows], token[on][:, None]), 1)
            if cache:
                kept.select(rows)
    return found if n_best is not None else [hypotheses[0].tokens for hypotheses in found]


def _extensions(totals: Tensor, sentence: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The most probable extensions of the hypotheses of each sentence, the most probable first.

    Given ``(hypotheses, vocabulary)`` and the sentences of the hypotheses, return log-probabilities, the hypotheses
    extended, and the tokens, each ``(sentences, width)``, and the sentences.  Where there are fewer extensions,
    log-probabilities are -inf.
    """
    value, token = _largest(totals, width)          # no other extension can be among the best of its sentence
    sentences, group, count = sentence.unique_consecutive(return_inverse=True, return_counts=True)
    row = torch.arange(len(sentence), device=sentence.device)
    place = row - (count.cumsum(0) - count)[group]
    shape = (len(sentences), int(count.max()), value.shape[-1])
    values = value.new_full(shape, -math.inf)
    values[group, place] = value
    tokens, rows = token.new_zeros(shape), token.new_zeros(shape)
    tokens[group, place], rows[group, place] = token, row[:, None].expand_as(token)
    best, chosen = _largest(values.flatten(1), width)
    return best, rows.flatten(1).gather(1, chosen), tokens.flatten(1).gather(1, chosen), sentences


def _largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of each row, and their places, the largest first; of equal ones, the first.

    ``topk`` does not say which of equal numbers it takes.
    """
    k = min(k, x.shape[-1])
    value, place = x.topk(k)
    if (x >= value[:, -1:]).sum() > place.numel():
        place = x.sort(descending=True, stable=True).indices[:, :k]
    place = place.sort().values
    value, order = x.gather(1, place).sort(descending=True, stable=True)
    return value, place.gather(1, order)


# ------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(
    model: Transformer, prompt: Int[Tensor, "batch n"], *, max_new: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float = 1.0, generator: torch.Generator | None = None, eos_id: int | None = None,
    cache: bool = True
) -> list[list[int]]:
    r"""Continue texts by a language model: every token is drawn from :func:`probabilities`, given those before it.

    A token is drawn by inverting the distribution function at a uniform number, one for each text and step, whether
    or not the text has ended; so neither the cache nor the end of another text changes what is drawn.

    Parameters
    ----------
    model : Transformer
        A decoder; it is put in evaluation mode for the call.
    prompt : Tensor
        ``(batch, n)``, texts of any lengths, each padded at its end with the model's ``pad_id``.  Any length will do:
        positions are sinusoidal, though the model knows only those it was trained on.
    max_new : int
        Number of tokens after which to stop all the same.
    temperature, top_k, top_p
        As in :func:`probabilities`; a temperature of 0 is greedy decoding, which draws nothing.
    generator : torch.Generator, optional
        What the numbers are drawn from, on the CPU; the same one gives the same texts.
    eos_id : int, optional
        The token that ends a text; without it, all go on to ``max_new``.
    cache : bool
        Whether to keep the keys and values of earlier tokens; otherwise they are all computed anew for every token,
        with the same result.

    Returns
    -------
    list of list of int
        The new tokens of each text, without ``eos_id``.

    Raises
    ------
    ValueError
        If a prompt is empty or padded elsewhere than at its end, ``max_new`` is below 1, a parameter is out of its
        range, or the model is not a decoder alone.
    FloatingPointError
        If a score of the model is not a number.
    """
    if model.config.architecture != "decoder":
        raise ValueError(f"sample() continues a text by a decoder alone, and this is a {model.config.architecture}; "
                         "an encoder-decoder translates by greedy() or beam()")
    if max_new < 1:
        raise ValueError(f"max_new must be at least 1, not {max_new}")
    _check_sampling(temperature, top_k, top_p)
    if prompt.ndim != 2 or prompt.is_floating_point():
        raise ValueError("prompt must be a matrix of token numbers (batch, length), padded at its end; got "
                         f"{tuple(prompt.shape)} of {prompt.dtype}")
    hidden = prompt == model.config.pad_id
    length = (~hidden).sum(-1)
    if (length == 0).any():
        raise ValueError(f"prompt {int((length == 0).nonzero()[0])} is empty; begin it with the token that began the "
                         "texts in training")
    if (hidden[:, :-1] & ~hidden[:, 1:]).any():
        raise ValueError("padding must come at the end of a prompt, but a token comes after it")
    with evaluating(model):
        text = F.pad(prompt, (0, max_new), value=model.config.pad_id)       # each new token comes after its prompt
        found = prompt.new_full((len(prompt), max_new), -1 if eos_id is None else eos_id)
        rows = torch.arange(len(prompt), device=prompt.device)      # of the texts that go on, and some more
        kept = model.new_cache() if cache else None
        for t in range(max_new):
            if not cache:
                last = model.decode(text[rows, :int(length[rows].max()) + t])
                last = last[torch.arange(len(rows), device=rows.device), length[rows] + t - 1]
            elif t == 0:
                last = model.decode(prompt, cache=kept, hidden=hidden if hidden.any() else None)[rows, length - 1]
            else:
                last = model.decode(found[rows, t - 1, None], cache=kept)[:, -1]
            p = probabilities(model.logits(last), temperature=temperature, top_k=top_k, top_p=top_p)
            if temperature:
                uniform = torch.rand(len(prompt), generator=generator, dtype=torch.float64)
                token = _draw(p.cpu(), uniform[rows.cpu()]).to(prompt.device)
            else:
                token = p.argmax(-1)
            if eos_id is not None and t:
                token = token.masked_fill(found[rows, t - 1] == eos_id, eos_id)
            found[rows, t] = token
            text[rows, length[rows] + t] = token
            if eos_id is None:
                continue
            on = (token != eos_id).nonzero()[:, 0]
            if len(on) == 0:
                break
            if 2 * len(on) <= len(rows):        # as in greedy()
                rows = rows[on]
                if cache:
                    kept.select(on)
    return [_until(eos_id, row) for row in found.tolist()]


def probabilities(
    logits: Float[Tensor, "*batch vocabulary"], *, temperature: float = 1.0, top_k: int | None = None,
    top_p: float = 1.0
) -> Float[Tensor, "*batch vocabulary"]:
    r"""What :func:`sample` draws the next token from.

    .. math:: p_i\propto\begin{cases}\exp(z_i/T)&\text{for }i\in S,\\0&\text{otherwise.}\end{cases}

    :math:`S` holds the ``top_k`` most probable tokens and, among them, the fewest most probable ones whose
    probabilities, given that it is one of the ``top_k``, add up to at least ``top_p``.  Of equally probable tokens,
    those with lower numbers come first.

    Parameters
    ----------
    logits : Tensor
        ``(..., vocabulary)``, the scores :math:`z`.
    temperature : float
        :math:`T`; 0 stands for the limit, the most probable token alone.
    top_k : int, optional
        At least 1; by default all tokens.
    top_p : float
        Above 0, at most 1.

    Returns
    -------
    Tensor
        ``(..., vocabulary)``, in at least float32.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    FloatingPointError
        If a score is not a number.

    References
    ----------
    Fan, Lewis and Dauphin 2018 (``top_k``); Holtzman et al. 2020 (``top_p``).
    """
    _check_sampling(temperature, top_k, top_p)
    logits = _numbers(logits)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    # The largest is subtracted first, so that no temperature is too low.
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_k is None and top_p == 1:
        return p
    p, token = p.sort(descending=True, stable=True)
    if top_k is not None:
        p[..., top_k:] = 0
        p = p / p.sum(-1, keepdim=True)
    before = F.pad(p.cumsum(-1)[..., :-1], (1, 0))
    p = p.masked_fill(before >= top_p, 0)
    return torch.zeros_like(p).scatter(-1, token, p / p.sum(-1, keepdim=True))


def _draw(p: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row at which the sum of probabilities exceeds a number from [0, 1)."""
    total = p.double().cumsum(-1)
    goal = torch.minimum(uniform * total[:, -1], total[:, -1].nextafter(total.new_zeros(())))
    return torch.searchsorted(total, goal[:, None], right=True)[:, 0]


def _check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be above 0, or 0 for greedy decoding, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all tokens, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")


# ------------------------------------------------------------------------- shared

@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """A model in evaluation mode for a while; then in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _limits(max_length: int | Sequence[int], batch: int) -> list[int]:
    limits = [max_length] * batch if isinstance(max_length, int) else list(max_length)
    if len(limits) != batch:
        raise ValueError(f"max_length must be one number, or one for each of the {batch} sources, not {len(limits)}")
    if bad := [limit for limit in limits if limit < 1]:
        raise ValueError(f"max_length must be at least 1, not {bad[0]}")
    return limits


def _numbers(logits: Tensor) -> Tensor:
    """Scores in at least float32; raise if the largest is not a number, which one that is not would make it."""
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError("a score of the model is not a number: its weights are damaged, or its training "
                                 "diverged; train it anew, with a lower learning rate")
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _until(end: int | None, row: list[int]) -> list[int]:
    return row[:row.index(end)] if end in row else row
