"""The house style: what it draws, what it refuses, and that it keeps its promises about colour and bytes."""

import itertools

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from kernelbook import kernels, plotting

DE, EN = ["Ein", "Hund", "rennt", "."], ["A", "dog", "is", "running", "."]
WEIGHTS = torch.softmax(torch.arange(20.0).reshape(5, 4).sin(), -1)


@pytest.fixture(autouse=True)
def house_style():
    with plotting.style():
        yield
    plt.close("all")


# ---- colours

def _linear(colour):
    c = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _oklab(linear):
    lms = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                    [0.0883024619, 0.2817188376, 0.6299787005]]) @ np.clip(linear, 0, 1)
    return np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]]) @ np.cbrt(lms)


# Machado, Oliveira and Fernandes 2009: what is left of a colour without the cones for red, green, blue
VISION = {
    "usual": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}


@pytest.mark.parametrize("vision", VISION)
def test_no_two_colours_are_alike_to_any_eye(vision):
    seen = [_oklab(VISION[vision] @ _linear(c)) for c in plotting.PALETTE]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.10


def test_colours_stand_out_from_white_as_wcag_asks_of_graphics():
    for colour in (*plotting.PALETTE, plotting.INK):
        luminance = _linear(colour) @ (0.2126, 0.7152, 0.0722)
        assert 1.05 / (luminance + 0.05) >= 3


def test_colour_is_never_the_only_cue():
    _, ax = plt.subplots()
    lines = [ax.plot([0, 1], [0, i])[0] for i in range(len(plotting.PALETTE))]
    assert len({line.get_color() for line in lines}) == len({str(s) for s in plotting.LINESTYLES}) == len(lines)
    assert len({(line._dash_pattern[1] and tuple(line._dash_pattern[1])) for line in lines}) == len(lines)


def test_each_kernel_has_one_look_of_its_own():
    names = [n for n in kernels.available() if n in plotting._KERNELS]
    assert set(plotting._KERNELS) <= set(kernels.available())
    looks = {n: str(plotting.kernel_style(n, marker=True)) for n in names}
    assert len(set(looks.values())) == len(names)
    assert plotting.kernel_style(kernels.RBF(bandwidth=2.0)) == plotting.kernel_style("rbf")
    assert "marker" not in plotting.kernel_style("rbf")
    own = plotting.kernel_style(kernels.RBF() + kernels.EDP())
    assert own["color"] == matplotlib.rcParams["axes.edgecolor"]


# ---- maps

def test_attention_map_draws_the_weights_on_a_scale_whose_zero_is_white():
    ax = plotting.attention_map(WEIGHTS.requires_grad_(), EN, DE, title="one head")
    image = ax.images[0]
    assert np.allclose(image.get_array(), WEIGHTS.detach())
    assert image.norm.vmin == 0 and image.norm.vmax == pytest.approx(WEIGHTS.max().item())
    assert image.cmap(0.0)[:3] == (1, 1, 1)
    assert [t.get_text() for t in ax.get_yticklabels()] == EN
    assert [t.get_text() for t in ax.get_xticklabels()] == DE


def test_a_token_is_text_and_not_mathematics():
    ax = plotting.attention_map(np.eye(2), ["$5", "a$b$"], ["x", "y"])
    ax.figure.canvas.draw()
    assert [t.get_text() for t in ax.get_yticklabels()] == [r"\$5", r"a\$b\$"]


def test_labels_do_not_touch():
    words = [f"Donaudampfschiff{i}" for i in range(12)]
    ax = plotting.attention_map(np.eye(12), words, words)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_xticklabels()]
    assert all(t.get_rotation() for t in ax.get_xticklabels())
    assert all(a.x0 < b.x0 for a, b in itertools.pairwise(boxes))
    assert ax.figure.get_size_inches()[0] <= plotting.WIDE
    inside = ax.figure.bbox
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and b.y1 <= inside.y1 for b in boxes)


def test_gram_map_is_symmetric_about_zero_where_there_are_negative_entries():
    image = plotting.gram_map([[1.0, -3.0], [0.5, 2.0]]).images[0]
    assert (image.norm.vmin, image.norm.vmax) == (-3, 3)
    assert image.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.03)
    image = plotting.gram_map([[1.0, 3.0]], limit=5).images[0]
    assert (image.norm.vmin, image.norm.vmax) == (0, 5) and image.cmap is not plotting.DIVERGING


@pytest.mark.parametrize(("call", "message"), [
    (lambda: plotting.attention_map(WEIGHTS[None]), "pick one matrix of the batch"),
    (lambda: plotting.attention_map(WEIGHTS[0]), r"must be a matrix \(n, m\)"),
    (lambda: plotting.attention_map(-WEIGHTS), "gram_map"),
    (lambda: plotting.attention_map(WEIGHTS, DE, EN), "4 labels for the rows; rows label queries"),
    (lambda: plotting.attention_map(WEIGHTS, columns=EN), "5 labels for the columns"),
    (lambda: plotting.gram_map([[1.0, float("nan")]]), "1 entries that are NaN or infinite"),
    (lambda: plotting.gram_map(np.zeros((0, 3))), "empty"),
    (lambda: plotting.band(plt.gca(), [1, 2, 3], np.zeros((3, 2))), "transpose runs"),
    (lambda: plotting.band(plt.gca(), [1, 2], [1, 2]), r"shape \(runs, 2\)"),
    (lambda: plotting.interval([[1.0], [2.0]], level=95), "0.95 for 95 %"),
    (lambda: plotting.interval([]), "no run"),
    (lambda: plotting.save(plt.figure(), "figure.svg"), ".png"),
    (lambda: plotting.png(plt.figure(), colours=1), "from 2 to 256"),
    (lambda: plotting.use("sepia"), "'light' or 'dark'"),
])
def test_what_cannot_be_drawn_is_refused_with_the_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- intervals over runs

def test_interval_is_students():
    from scipy import stats

    runs = np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 8.0]])
    mean, half = plotting.interval(runs, level=0.9)
    low, high = stats.t.interval(0.9, 2, loc=runs.mean(0), scale=stats.sem(runs))
    assert np.allclose([mean - half, mean + half], [low, high], rtol=1e-12)
    assert np.isnan(plotting.interval(runs[:1])[1]).all()


def test_band_draws_the_mean_and_the_interval():
    _, ax = plt.subplots()
    runs = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 5.0]])
    line = plotting.band(ax, [0, 1, 2], runs, label="two seeds")
    mean, half = plotting.interval(runs)
    assert np.allclose(line.get_ydata(), mean)
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(edges.min(), (mean - half).min()) and np.isclose(edges.max(), (mean + half).max())
    plotting.band(ax, [0, 1, 2], runs[:1])
    assert len(ax.collections) == 1                          # one run has no interval


# ---- files

def test_images_are_the_same_on_every_run_and_carry_no_version(tmp_path):
    def draw():
        fig, ax = plt.subplots()
        ax.plot(np.linspace(0, 1, 50) ** 2)
        return fig

    first, second = (plotting.save(draw(), tmp_path / f"{i}.png").read_bytes() for i in range(2))
    assert first == second and b"matplotlib" not in first.lower()
    assert int.from_bytes(first[16:20], "big") == round(2 * plotting.WIDTH * 100)
    small = plotting.png(draw(), colours=32)
    assert len(small) < len(first) / 2


def test_fewer_colours_keep_white_white():
    from PIL import Image

    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noisy.paste((255, 255, 255), (0, 0, 32, 64))
    (indices,), palette = plotting.quantise([noisy], 16)
    assert len(palette) <= 16 and (palette[indices[:, :32]] == 255).all()


def test_style_is_undone_after_its_block():
    before = matplotlib.rcParams["axes.facecolor"]
    with plotting.style("dark"):
        assert matplotlib.rcParams["axes.facecolor"] != before
    assert matplotlib.rcParams["axes.facecolor"] == before
