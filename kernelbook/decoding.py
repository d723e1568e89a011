"""Decoding: from a trained model's scores to sequences of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from .models import Transformer

__all__ = ["greedy"]


@torch.no_grad()
def greedy(
    model: Transformer, source: Int[Tensor, "batch m"], *, bos_id: int, eos_id: int, max_length: int
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
        target = source.new_full((source.shape[0], 1), bos_id)
        done = torch.zeros(source.shape[0], dtype=torch.bool, device=source.device)
        for _ in range(max_length):
            last = model.decode(target, memory, hidden)[:, -1]
            token = model.logits(last).argmax(-1).masked_fill(done, eos_id)
            target = torch.cat((target, token[:, None]), 1)
            done |= token == eos_id
            if done.all():
                break
    finally:
        model.train(was_training)
    return [row[: row.index(eos_id)] if eos_id in row else row for row in target[:, 1:].tolist()]
