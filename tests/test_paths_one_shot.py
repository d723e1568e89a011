"""Episodes of one example of each of two classes, as sequences of tokens."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kernelbook.data import Images, load_images
from kernelbook.paths import one_shot


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(sizes=(2, 3, 4, 2, 5), groups="AABBC", size=16, seed=0):
    """Images of noise."""
    counts = torch.tensor(sizes)
    return Images(torch.rand(int(counts.sum()), size, size, generator=generator(seed)),
                  torch.arange(len(sizes)).repeat_interleave(counts), [f"class {n}" for n in range(len(sizes))],
                  list(groups[:len(sizes)]))


@given(st.lists(st.integers(2, 6), min_size=2, max_size=9), st.integers(1, 50), st.integers(0, 1000))
def test_the_target_is_the_label_of_the_shot_of_the_same_class(sizes, count, seed):
    images = some(sizes, "A" * len(sizes), size=8)
    found = one_shot.episodes(images, count, generator=generator(seed))
    classes = images.classes[found.choice]
    for (first, second, query), (a, b), choice, y in zip(classes.tolist(), found.marks.tolist(), found.choice.tolist(),
                                                         found.labels.tolist(), strict=True):
        assert first != second and query in (first, second)
        assert {a, b} == {0, 1}
        assert y == (1 if (a if query == first else b) == 1 else -1)
        assert len(set(choice)) == 3                        # the query is not one of the shots
    assert found.labels.sum() == count % 2                  # balanced
    assert len(found) == count and found.tokens.dtype == found.labels.dtype == torch.float32


def test_a_generator_gives_the_same_episodes_again():
    images = some()
    one, again, other = (one_shot.episodes(images, 40, generator=generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(again).values(), strict=True))
    assert not torch.equal(one.choice, other.choice)
    state = generator()
    assert not torch.equal(one_shot.episodes(images, 40, generator=state).choice,
                           one_shot.episodes(images, 40, generator=state).choice)


def close(count, share, total):
    """Within five standard deviations of what is expected."""
    return abs(count - share * total) < 5 * math.sqrt(total * share * (1 - share))


def test_everything_is_drawn_uniformly_and_independently():
    images, total = some(), 20_000
    found = one_shot.episodes(images, total, generator=generator(), channels=1)
    first, second, query = images.classes[found.choice].T
    pairs = Counter(zip(query.tolist(), torch.where(query == first, second, first).tolist(), strict=True))
    assert len(pairs) == 20 and all(close(n, 1 / 20, total) for n in pairs.values())
    place, one, plus = query == second, found.marks[:, 1] == 1, found.labels == 1
    joint = Counter(zip(place.tolist(), one.tolist(), plus.tolist(), strict=True))
    assert len(joint) == 4 and all(close(n, 1 / 4, total) for n in joint.values())
    like = torch.where(place, found.choice[:, 1], found.choice[:, 0])
    images_of_4 = Counter(zip(found.choice[query == 4, 2].tolist(), like[query == 4].tolist(), strict=True))
    assert len(images_of_4) == 20 and all(close(n, 1 / 100, total) for n in images_of_4.values())
    unlike = torch.where(place, found.choice[:, 0], found.choice[:, 1])
    assert all(close(n, 1 / 25, total) for n in Counter(unlike[images.classes[unlike] == 4].tolist()).values())
    # The order of the targets says nothing: they are not sorted, nor do they alternate.
    assert close(int(plus[: total // 2].sum()), 1 / 2, total // 2)
    assert close(int((plus[1:] == plus[:-1]).sum()), 1 / 2, total - 1)


@pytest.mark.parametrize("groups", ["AABBC", "BACAB"])
def test_both_classes_of_one_group(groups):
    images, total = some(groups=groups), 8_000
    found = one_shot.episodes(images, total, generator=generator(), within_groups=True, channels=1)
    classes = images.classes[found.choice]
    letters = [{groups[c] for c in row} for row in classes.tolist()]
    assert all(len(letter) == 1 for letter in letters)
    assert Counter(frozenset(row) for row in classes.tolist()).keys() == {
        frozenset(n for n in range(5) if groups[n] == letter) for letter in "AB"}       # C has a single class
    assert all(close(n, 1 / 4, total) for n in Counter(classes[:, 2].tolist()).values())


def layer_norm(patch):
    centred = patch - patch.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt()


def test_tokens_by_definition():
    images = some(size=16)
    found = one_shot.episodes(images, 6, generator=generator())
    assert found.tokens.shape == (6, 192, 12)
    label = one_shot._embeddings(192)
    for x, choice, marks in zip(found.tokens, found.choice, found.marks, strict=True):
        t = 0
        for image, mark in zip(choice.tolist(), [*marks.tolist(), 2], strict=True):
            for row in (0, 8):
                for column in (0, 8):
                    patch = layer_norm(images.pixels[image, row:row + 8, column:column + 8].double().flatten())
                    angle = [t * 10_000 ** (-2 * (i // 2) / 192) for i in range(192)]
                    position = [math.sin(a) if i % 2 == 0 else math.cos(a) for i, a in enumerate(angle)]
                    expected = patch.repeat(3) + math.sqrt(2) * torch.tensor(position).double() + label[mark]
                    assert torch.allclose(x[:, t].double(), expected, atol=1e-5)
                    t += 1


def test_omniglot_sizes_give_48_tokens():
    found = one_shot.episodes(some(size=32), 5, generator=generator())
    assert found.tokens.shape == (5, 192, 48) and found.tokens.is_contiguous()
    assert one_shot.episodes(some(size=32), 5, generator=generator(), channels=1).tokens.shape == (5, 64, 48)


def test_patches_positions_and_labels_weigh_the_same():
    label = one_shot._embeddings(192)
    assert torch.allclose(label.square().sum(1), torch.tensor(192.0).double())
    assert (label @ label.T).fill_diagonal_(0).abs().max() < 0.2 * 192
    assert torch.allclose(one_shot.patches(some().pixels).square().mean(-1), torch.tensor(1.0), atol=1e-3)
    blank = torch.full((1, 3, 16, 16), 0.25)
    assert one_shot.patches(blank).abs().max() == 0
    marks = torch.tensor([[0, 1]])
    x = one_shot.tokens(blank, marks)
    positions = x.mT.squeeze(0) - label.float()[[0] * 4 + [1] * 4 + [2] * 4]
    assert torch.allclose(positions.square().sum(1), torch.tensor(192.0))


def test_copies_leave_room_for_positions_and_labels():
    """Differences of copies do not depend on the pixels, and determine place and label; one copy has no such room."""
    marks = torch.tensor([[0, 1], [0, 1], [1, 0]])
    pixels = torch.rand(3, 3, 16, 16, generator=generator())
    x = one_shot.tokens(pixels, marks).unflatten(1, (3, 64))
    differences = x.diff(dim=1).flatten(1, 2)                                   # (3, 128, 12)
    assert torch.allclose(differences[0], differences[1], atol=1e-5)            # other pixels
    assert (differences[0] - differences[2])[:, :8].norm(dim=0).min() > 1       # other labels of the shots
    assert torch.allclose(differences[0][:, 8:], differences[2][:, 8:], atol=1e-5)      # not of the query
    assert torch.pdist(differences[0].T).min() > 1                              # and all places differ
    assert torch.linalg.matrix_rank(one_shot.patches(some((30, 30), "AA").pixels).flatten(0, 1)) == 63


@given(st.integers(0, 1000), st.integers(1, 4))
def test_the_nearest_shot_by_definition(seed, channels):
    images = some(size=16, seed=seed)
    found = one_shot.episodes(images, 15, generator=generator(seed), channels=channels)
    pixels, patch = images.pixels[found.choice], one_shot.patches(images.pixels)[found.choice]
    for measure in ("pixels", "patches"):
        answers = []
        for p in range(15):
            if measure == "pixels":
                alike = [-torch.dist(pixels[p, k], pixels[p, 2]) for k in (0, 1)]
            else:
                alike = [F.cosine_similarity(patch[p, k], patch[p, 2], dim=-1).mean() for k in (0, 1)]
            answers.append(1 if found.marks[p, int(alike[1] > alike[0])] == 1 else -1)
        assert one_shot.nearest(images, found, measure).tolist() == answers


def test_moved_images_are_recognised():
    first = torch.zeros(4, 32, 32)
    first[:, 8:24, 8:24] = (torch.rand(4, 16, 16, generator=generator()) < 0.2).float()
    moved = first.roll((3, -2), (1, 2))
    images = Images(torch.stack([first, moved], 1).flatten(0, 1), torch.arange(8) // 2, list("abcd"), ["A"] * 4)
    found = one_shot.episodes(images, 100, generator=generator())
    assert torch.equal(one_shot.nearest(images, found, "moved"), found.labels)
    right = (one_shot.nearest(images, found, "pixels") == found.labels).float().mean()
    assert right < 0.9                                                          # control: it needs the move
    # The largest cosine over all moves is that of the blurred images, and moves do not come in on the other side.
    pixels = images.pixels[found.choice]
    like = torch.where(found.marks == 1, found.labels[:, None], -found.labels[:, None]) > 0
    assert torch.allclose(one_shot._moved(pixels)[like], torch.tensor(1.0), atol=1e-5)
    edges = torch.zeros(1, 3, 32, 32)
    edges[0, 0, 16, 0] = edges[0, 1, 16, 25] = edges[0, 2, 16, 31] = 1
    assert one_shot._moved(edges)[0, 0] < 1e-6 < one_shot._moved(edges)[0, 1]


@pytest.mark.parametrize("change, words", [
    ({"count": 0}, "positive integer, not 0"),
    ({"count": 2.0}, "positive integer, not 2.0"),
    ({"channels": 0}, "channels must be a positive integer, not 0"),
    ({"images": some((4,), "A")}, "two classes, but of classes and groups there are 1 and 1"),
    ({"images": some((2, 2), "AB"), "within_groups": True}, "two classes of one group, but .* there are 2 and 2"),
    ({"images": some((2, 1), "AA")}, "only one of 'class 1'; leave it out"),
    ({"images": some(size=12)}, "a multiple of 8"),
    ({"images": Images(**(vars(some()) | {"groups_differ": False}))}, "may be the same; set within_groups=True"),
])
def test_episodes_that_cannot_be_drawn(change, words):
    with pytest.raises(ValueError, match=words):
        one_shot.episodes(**({"images": some(), "count": 3, "generator": generator()} | change))


def test_tokens_and_measures_that_make_no_sense():
    pixels, marks = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"expected pixels \(P, 3, size, size\) and marks"):
        one_shot.tokens(pixels, marks[:1])
    with pytest.raises(ValueError, match="one must be labelled 0 and the other 1"):
        one_shot.tokens(pixels, torch.ones(2, 2, dtype=torch.long))
    found = one_shot.episodes(some(), 3, generator=generator())
    with pytest.raises(ValueError, match="no measure 'cosine'; choose 'pixels', 'patches' or 'moved'"):
        one_shot.nearest(some(), found, "cosine")


def test_digits_can_be_told_apart_by_their_pixels():
    """0 against 1 of the digits that come with scikit-learn: a task of another kind for what learned characters."""
    images = load_images("digits").test
    found = one_shot.episodes(images, 500, generator=generator(), channels=1)
    for measure in ("pixels", "patches", "moved"):
        right = (one_shot.nearest(images, found, measure) == found.labels).float().mean()
        assert 0.85 < right < 1, measure
