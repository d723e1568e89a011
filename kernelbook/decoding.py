"""Decoding: from a trained model's scores to sequences of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from .models import Transformer

__all__ = ["greedy"]


@torch.no_grad()
def greedy(
    model: Transformer, source: Int[Tensor, "batch m"], *, bos_id: int, eos_id: int, max_length: int,
    cache: bool = True
) -> list[list[int]]:
    r"""Greedy decoding: at every step the most probable next token, :math:`y_t=\arg\max_y p(y\mid y_{<t},x)`.

    Parameters
    ----------
    model : Transformer
        An encoder-decoder; it is put in evaluation mode for the call.
    source : Tensor
        ``(batch, m)``, padded with the model's ``pad_id``.
    bos_id, eos_id : int
        The tokens that begin and end a target.
    max_length : int
        Number of tokens after which to stop all the same.
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
        If ``max_length`` is below 1, or the model has no encoder or no decoder.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    was_training = model.training
    model.eval()
    try:
        memory, hidden = model.encode(source)
        found = source.new_full((source.shape[0], 1 + max_length), eos_id)
        found[:, 0] = bos_id
        rows = torch.arange(source.shape[0], device=source.device)      # of the sequences that go on, and some more
        kept = model.new_cache(memory, hidden) if cache else None
        for t in range(max_length):
            if cache:
                last = model.decode(found[rows, t, None], cache=kept)
            else:
                last = model.decode(found[rows, :t + 1], memory[rows], hidden[rows])
            token = model.logits(last[:, -1]).argmax(-1)
            if t:
                token = token.masked_fill(found[rows, t] == eos_id, eos_id)
            found[rows, t + 1] = token
            on = (token != eos_id).nonzero()[:, 0]
            if len(on) == 0:
                break
            if 2 * len(on) <= len(rows):        # copying what was kept is worth it, and at most doubles the work
                rows = rows[on]
                if cache:
                    kept.select(on)
    finally:
        model.train(was_training)
    return [row[: row.index(eos_id)] if eos_id in row else row for row in found[:, 1:].tolist()]
