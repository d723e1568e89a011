"""Batches of sequences of similar length, limited by their padded size rather than by their number."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import DataError


def token_budget_batches(
    lengths: Sequence[int], budget: int, *, shuffle: bool = True, seed: int = 0, epoch: int = 0
) -> list[list[int]]:
    r"""Group sequences of similar length so that no batch, once padded, holds more than `budget` tokens.

    A batch :math:`B` of sequences of lengths :math:`\ell_i` costs :math:`|B| \cdot \max_{i \in B} \ell_i`
    tokens when it is padded. The sequences are sorted by length and the sorted list is cut greedily, as late
    as the budget allows.

    Parameters
    ----------
    lengths : sequence of int
        The length of each sequence, in tokens; for pairs, the larger of the two sides.
    budget : int
        The largest padded size of a batch, in tokens.
    shuffle : bool
        Put sequences of equal length, and then the batches, into an order drawn from `seed` and `epoch`.
        Otherwise both stay in the order of length, ties in the order given.
    seed, epoch : int
        The same pair of numbers gives the same batches on every machine.

    Returns
    -------
    list of list of int
        Indices into `lengths`: every index exactly once, no batch empty.

    Raises
    ------
    DataError
        If one sequence alone is longer than the budget.
    ValueError
        If the budget is not positive, or a length is negative.
    """
    lengths = [int(length) for length in lengths]
    if budget < 1:
        raise ValueError(f"budget must be a positive number of tokens, not {budget!r}")
    if lengths and min(lengths) < 0:
        index = min(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(f"lengths[{index}] is {lengths[index]}; a length cannot be negative")
    if lengths and max(lengths) > budget:
        index = max(range(len(lengths)), key=lengths.__getitem__)
        raise DataError(
            f"sequence {index} has {lengths[index]} tokens, more than the budget of {budget} tokens a batch; "
            f"raise the budget to {lengths[index]} or more, or drop long sequences (ParallelCorpus.short)"
        )
    # Seeding with a string hashes it, so that (seed, epoch) = (1, 12) and (11, 2) are unrelated.
    generator = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    if shuffle:
        generator.shuffle(order)
    order.sort(key=lengths.__getitem__)  # stable: it keeps the shuffled order among equal lengths

    batches: list[list[int]] = []
    for index in order:
        # The list is sorted, so the newest sequence is the longest of its batch.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    if shuffle:
        generator.shuffle(batches)
    return batches


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> Int[Tensor, "batch longest"]:
    """Stack sequences of token ids into one tensor, the short ones filled up on the right with `pad_id`.

    Parameters
    ----------
    sequences : sequence of sequences of int
        At least one sequence; they may differ in length and may be empty.
    pad_id : int
        The id to fill with. ``padded != pad_id`` is the mask of real tokens if no sequence contains it.

    Returns
    -------
    Tensor
        Of shape ``(batch, longest)`` and type ``torch.long``.

    Raises
    ------
    ValueError
        If there is no sequence.
    """
    if not sequences:
        raise ValueError("pad needs at least one sequence, to know the length of the longest")
    longest = max(map(len, sequences))
    return torch.tensor([[*s, *[pad_id] * (longest - len(s))] for s in sequences], dtype=torch.long).reshape(
        len(sequences), longest
    )


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share of padding among all tokens of the batches: 0 if all sequences of each batch are equally long."""
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    real = sum(lengths[i] for batch in batches for i in batch)
    return 1 - real / padded if padded else 0.0
