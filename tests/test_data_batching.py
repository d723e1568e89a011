"""Batches: every index once, never over budget, little padding, the same on every run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelbook import data

lengths_and_budget = st.integers(1, 200).flatmap(
    lambda budget: st.tuples(st.lists(st.integers(0, budget), max_size=60), st.just(budget))
)


@settings(max_examples=100)
@given(lengths_and_budget, st.booleans(), st.integers(0, 5), st.integers(0, 5))
def test_batches_hold_every_index_once_and_keep_to_the_budget(case, shuffle, seed, epoch):
    lengths, budget = case
    batches = data.token_budget_batches(lengths, budget, shuffle=shuffle, seed=seed, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batch and len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
    assert batches == data.token_budget_batches(lengths, budget, shuffle=shuffle, seed=seed, epoch=epoch)


@settings(max_examples=100)
@given(lengths_and_budget)
def test_no_batch_could_have_taken_the_next_sequence_too(case):
    lengths, budget = case
    batches = data.token_budget_batches(lengths, budget, shuffle=False)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * lengths[following[0]] > budget


def test_epochs_and_seeds_give_different_orders_and_no_shuffle_sorts():
    lengths = [1 + i % 7 for i in range(100)]
    drawn = {
        str(data.token_budget_batches(lengths, 20, seed=seed, epoch=epoch)) for seed in (1, 11) for epoch in (2, 12)
    }
    assert len(drawn) == 4
    in_order = [i for batch in data.token_budget_batches(lengths, 20, shuffle=False) for i in batch]
    assert in_order == sorted(range(100), key=lambda i: lengths[i])


def test_the_order_is_the_same_on_every_machine():
    assert data.token_budget_batches([3, 1, 2, 3, 1], 6, seed=3, epoch=1) == [[0, 3], [1, 4, 2]]


@pytest.mark.parametrize(
    "lengths, budget, error, words",
    [
        ([3, 9, 4], 8, data.DataError, r"sequence 1 has 9 tokens.*budget of 8.*raise the budget to 9"),
        ([3], 0, ValueError, "positive number of tokens, not 0"),
        ([3, -2], 8, ValueError, r"lengths\[1\] is -2"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_an_error(lengths, budget, error, words):
    with pytest.raises(error, match=words):
        data.token_budget_batches(lengths, budget)


def test_padding_share():
    assert data.padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert data.padding_share([4, 4], [[0, 1]]) == 0


@given(st.lists(st.lists(st.integers(4, 99), max_size=8), min_size=1, max_size=6))
def test_pad_keeps_every_id_and_fills_the_rest(sequences):
    padded = data.pad(sequences, pad_id=0)
    assert padded.dtype == torch.long
    assert padded.shape == (len(sequences), max(map(len, sequences)))
    for row, sequence in zip(padded.tolist(), sequences, strict=True):
        assert row == sequence + [0] * (len(row) - len(sequence))


def test_pad_needs_a_sequence():
    with pytest.raises(ValueError, match="at least one sequence"):
        data.pad([], 0)
