r"""The house style: one look for every figure, legible in print, on a phone, and to a colour-blind reader.

::

    from kernelbook import plotting
    plotting.use()

A figure is drawn once, dark on white, and read in both themes: as it is on a light page, and inverted by the book's
style sheet on a dark one, so no colour carries meaning by being light or dark in itself.  Colour is never the only
cue either: each colour of the cycle comes with a line style of its own, and each kernel keeps its own pair of the two
through the whole book (:func:`kernel_style`).

The images are deterministic: of fixed size, and without a date or a version in the file.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from PIL import Image

    from .results import Group

__all__ = [
    "PALETTE", "LINESTYLES", "MARKERS", "SEQUENTIAL", "DIVERGING", "WIDTH", "WIDE", "INK",
    "use", "style", "kernel_style", "attention_map", "gram_map", "band", "interval", "plot_benchmark",
    "plot_suite", "describe_suite", "plot_curves", "describe_curves", "png", "save",
]

#: Widths of a figure in inches; at 100 dots to the inch they fit the column of the rendered book.
WIDTH, WIDE = 6.4, 7.2

#: The colour of text, axes and reference lines.
INK = "#262626"

#: Seven colours, in order of use: each at least 3 : 1 against white, and no two alike to any colour vision.
PALETTE = ("#0a46c8", "#d17a00", "#03878b", "#890d72", "#3b2c28", "#4595ff", "#6b5a14")

#: The line style that goes with each colour.
LINESTYLES = ("-", (0, (5, 1.6)), (0, (6, 1.5, 1.2, 1.5)), (0, (1.2, 1.2)), (0, (3, 1.2, 1, 1.2, 1, 1.2)),
              (0, (8, 2.5)), (0, (2.5, 2.5)))

#: The marker that goes with each colour.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

#: White at 0, dark at the top: for weights and other values that are never negative.
SEQUENTIAL = LinearSegmentedColormap.from_list(
    "kernelbook.sequential", ["#ffffff", "#d3e2f7", "#8fb6ea", "#4380d8", "#0a46c8", "#06225f"])

#: White at 0, blue above, amber below: for signed values, to be used with limits that are symmetric about 0.
DIVERGING = LinearSegmentedColormap.from_list(
    "kernelbook.diverging", ["#5c3200", "#b96a00", "#e8a95a", "#f8e3c8", "#ffffff", "#d3e2f7", "#6f9fe3", "#0a46c8",
                             "#06225f"])

for _map in (SEQUENTIAL, DIVERGING):
    mpl.colormaps.register(_map, force=True)

_DPI = 100                                    # at which WIDTH inches are as wide as they are meant to be read
_METADATA = {"Software": None}                # or matplotlib writes its version into every file

_KERNELS = ("edp", "rbf", "exponentiated_intersection", "quadratic", "taylor", "l2", "l2_squared", "linear",
            "polynomial", "intersection", "cosine")


def _rc(mode: str) -> dict[str, Any]:
    if mode not in ("light", "dark"):
        raise ValueError(f"mode must be 'light' or 'dark', not {mode!r}")
    ink, paper, grid = (INK, "white", "#dedede") if mode == "light" else ("#e6e6e6", "#14181e", "#39404a")
    colours = PALETTE if mode == "light" else tuple(_lighten(c) for c in PALETTE)
    return {
        "figure.figsize": (WIDTH, 3.4), "figure.dpi": _DPI, "savefig.dpi": "figure",
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.07, "figure.constrained_layout.w_pad": 0.07,
        "figure.facecolor": paper, "savefig.facecolor": paper,
        "figure.titlesize": 12, "font.family": "DejaVu Sans", "font.size": 11, "mathtext.fontset": "cm",
        "axes.facecolor": paper, "axes.edgecolor": ink, "axes.labelcolor": ink, "text.color": ink,
        "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.titlepad": 8, "axes.labelsize": 11,
        "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
        "axes.grid": True, "grid.color": grid, "grid.linewidth": 0.7, "axes.formatter.use_mathtext": True,
        "axes.prop_cycle": cycler(color=colours) + cycler(linestyle=LINESTYLES),
        "xtick.color": ink, "ytick.color": ink, "xtick.labelsize": 10, "ytick.labelsize": 10,
        "xtick.major.width": 0.8, "ytick.major.width": 0.8,
        "lines.linewidth": 2.0, "lines.markersize": 5.5, "scatter.edgecolors": "face", "patch.linewidth": 0.8,
        "legend.frameon": False, "legend.fontsize": 10, "legend.handlelength": 2.8,
        "image.cmap": SEQUENTIAL.name, "image.interpolation": "nearest", "image.aspect": "equal",
    }


def _lighten(colour: str, by: float = 0.45) -> tuple[float, ...]:
    return tuple(c + by * (1 - c) for c in mpl.colors.to_rgb(colour))


def _on_paper(colour: Any) -> Any:
    """A kernel's colour, lighter where the paper is dark; the ink's own is so already."""
    dark = mpl.colors.rgb_to_hsv(mpl.colors.to_rgb(mpl.rcParams["axes.facecolor"]))[2] < 0.5
    return _lighten(colour) if dark and colour != mpl.rcParams["axes.edgecolor"] else colour


def use(mode: str = "light") -> None:
    """Set the house style for every figure drawn from here on; in a notebook also for how figures are stored.

    Parameters
    ----------
    mode : {"light", "dark"}
        Dark on white, or light on near-black. The book is drawn in ``"light"`` throughout: its style sheet inverts
        figures on a dark page. ``"dark"`` is for a reader's own dark slides.

    Raises
    ------
    ValueError
        If ``mode`` is neither.
    """
    mpl.rcParams.update(_rc(mode))
    _configure_notebook()


@contextmanager
def style(mode: str = "light") -> Iterator[None]:
    """The house style inside a ``with`` block only; what was set before comes back after it.

    Parameters
    ----------
    mode : {"light", "dark"}
        As in :func:`use`.

    Raises
    ------
    ValueError
        If ``mode`` is neither.
    """
    with mpl.rc_context(_rc(mode)):
        yield


def _configure_notebook() -> None:
    """Under Jupyter, store figures at twice their size (for fine screens), uncropped, and without a version."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or not hasattr(shell, "kernel"):
        return
    from IPython.core.pylabtools import select_figure_formats
    from matplotlib_inline.config import InlineBackend

    backend = InlineBackend.instance(parent=shell)
    backend.print_figure_kwargs = {"bbox_inches": None, "metadata": dict(_METADATA)}
    backend.figure_formats = {"retina"}
    select_figure_formats(shell, backend.figure_formats, **backend.print_figure_kwargs)


# -------------------------------------------------------------------------------------------- what is drawn

def kernel_style(kernel: Any, *, marker: bool = False) -> dict[str, Any]:
    """The colour and line style that a kernel keeps through the whole book, as keywords for ``Axes.plot``.

    Parameters
    ----------
    kernel : str or Kernel
        A kernel's name, or a kernel.
    marker : bool
        Whether to add the marker that goes with the pair, for lines through few points.

    Returns
    -------
    dict
        ``color`` and ``linestyle``, and ``marker`` if asked for. A kernel that is not the library's own is drawn in
        the colour of the axes.
    """
    name = kernel if isinstance(kernel, str) else _name(kernel)
    if name in _KERNELS:
        i = _KERNELS.index(name)
        colour, shift = PALETTE[i % len(PALETTE)], i // len(PALETTE)
        look = {"color": colour, "linestyle": LINESTYLES[(i + 3 * shift) % len(LINESTYLES)]}
        mark = MARKERS[(i + 3 * shift) % len(MARKERS)]
    else:
        look, mark = {"color": mpl.rcParams["axes.edgecolor"], "linestyle": (0, (1, 3))}, "*"
    return {**look, "marker": mark} if marker else look


def attention_map(
    weights: ArrayLike,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    row_label: str = "query",
    column_label: str = "key",
    top: float | None = None,
    colorbar: bool = True,
) -> Axes:
    r"""The weights :math:`w_{ij}` that query :math:`i` gives to key :math:`j`, one row a query; 0 is white.

    Parameters
    ----------
    weights : array_like or Tensor
        ``(n, m)``, never negative.
    rows, columns : sequence of str, optional
        The tokens of the ``n`` queries and the ``m`` keys.
    ax : Axes, optional
        Where to draw; by default on a new figure whose size fits the number of tokens.
    title : str, optional
        Above the map.
    row_label, column_label : str
        What the rows and columns are.
    top : float, optional
        The weight that is darkest; by default the largest one. Give 1 to compare several maps.
    colorbar : bool
        Whether to draw the scale beside the map.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If ``weights`` is not a matrix of finite numbers that are at least 0, or a label is missing or too many.
    """
    w = _matrix(weights, "weights", rows, columns)
    if w.min() < 0:
        raise ValueError(f"weights has negative entries (the least is {w.min():.3g}), for which white = 0 has no place "
                         "on this scale; draw it with gram_map")
    image = _map(w, rows, columns, ax, cmap=SEQUENTIAL, vmin=0.0, vmax=top or w.max() or 1.0)
    return _finish_map(image, title, row_label, column_label, colorbar, "weight")


def gram_map(
    matrix: ArrayLike,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    row_label: str = "query",
    column_label: str = "key",
    limit: float | None = None,
    colorbar: bool = True,
) -> Axes:
    r"""A matrix :math:`[\kappa(q_i,k_j)]_{ij}` of either sign: 0 is white, blue is positive, amber is negative.

    A matrix without negative entries is drawn on the scale of :func:`attention_map`.

    Parameters
    ----------
    matrix : array_like or Tensor
        ``(n, m)``.
    rows, columns : sequence of str, optional
        Labels of the rows and of the columns.
    ax : Axes, optional
        Where to draw; by default on a new figure.
    title : str, optional
        Above the map.
    row_label, column_label : str
        What the rows and columns are.
    limit : float, optional
        The absolute value that is darkest; by default the largest one. Give it to compare several matrices.
    colorbar : bool
        Whether to draw the scale beside the map.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If ``matrix`` is not a matrix of finite numbers, or a label is missing or too many.
    """
    K = _matrix(matrix, "matrix", rows, columns)
    limit = limit or np.abs(K).max() or 1.0
    signed = K.min() < 0
    image = _map(K, rows, columns, ax, cmap=DIVERGING if signed else SEQUENTIAL,
                 vmin=-limit if signed else 0.0, vmax=limit)
    return _finish_map(image, title, row_label, column_label, colorbar, "value")


def band(
    ax: Axes,
    x: ArrayLike,
    runs: ArrayLike,
    *,
    level: float = 0.95,
    **look: Any,
) -> Line2D:
    """The mean of several runs as a line, and its confidence interval as a band.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    x : array_like
        ``(points,)``.
    runs : array_like
        ``(runs, points)``: one row a seed.
    level : float
        Confidence of the interval; see :func:`interval`.
    **look
        Keywords for ``Axes.plot``: ``label``, and what :func:`kernel_style` gives.

    Returns
    -------
    Line2D
        The line of the mean.

    Raises
    ------
    ValueError
        If the shapes do not fit, or ``level`` is not between 0 and 1.
    """
    x, runs = _array(x), _array(runs)
    if x.ndim != 1 or runs.ndim != 2 or runs.shape[1] != x.size:
        raise ValueError(f"runs must have one row a run and one column a point of x, so the shape (runs, {x.size}); "
                         f"x has shape {x.shape}, runs {runs.shape}" + (
                             "; transpose runs" if runs.ndim == 2 and runs.shape[0] == x.size else ""))
    mean, half = interval(runs, level)
    (line,) = ax.plot(x, mean, **look)
    if len(runs) > 1:
        ax.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.18, linewidth=0)
    return line


def interval(runs: ArrayLike, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    r"""Mean and half-width of Student's confidence interval, :math:`\bar x\pm t_{n-1}\,s/\sqrt n`, over the runs.

    Parameters
    ----------
    runs : array_like
        ``(runs, ...)``: the first axis counts the runs.
    level : float
        Confidence, between 0 and 1.

    Returns
    -------
    mean, half : ndarray
        ``(...)`` each. With a single run the half-width is unknown: NaN.

    Raises
    ------
    ValueError
        If there is no run, or ``level`` is not between 0 and 1.
    """
    runs = _array(runs)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1 (0.95 for 95 %), not {level}")
    if runs.ndim == 0 or len(runs) == 0:
        raise ValueError("there is no run to take a mean of; runs must have shape (runs, ...)")
    n, mean = len(runs), runs.mean(0)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    from scipy.special import stdtrit

    return mean, stdtrit(n - 1, (1 + level) / 2) * runs.std(0, ddof=1) / np.sqrt(n)


def plot_benchmark(
    record: dict[str, Any],
    *,
    suite: str = "attention",
    candidates: Sequence[str] | None = None,
) -> Figure:
    """The times of a benchmark's candidates, as multiples of torch's fused attention, one row a candidate.

    Our own are filled marks, those of other libraries hollow ones; which mark says the length.

    Parameters
    ----------
    record : dict
        As :func:`kernelbook.bench.run` returns it.
    suite : str
        ``"attention"`` or ``"causal"``.
    candidates : sequence of str, optional
        Their names in the record, in order from the top.  By default each kernel is one row, at each length by the
        path that ``auto`` takes there; besides there are the compiled paths and the other libraries; and those that
        are quickest at the greatest length come first.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If nothing of the kind was measured.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    rows = [row for row in record["rows"] if row["suite"] == suite and "ratio" in row]
    if candidates is None:
        rows = [row | {"candidate": row["kernel"]} if row.get("auto") else row for row in rows
                if row.get("auto") or row["candidate"] != "SDPA" and row["who"] != "kernelbook"
                or "compiled" in row.get("path", "")]
    else:
        rows = [row for row in rows if row["candidate"] in candidates]
    if not rows:
        raise ValueError(f"the record has no ratios of the suite {suite!r}" + (
            f" and the candidates {list(candidates)}" if candidates is not None else ""))
    lengths = sorted({row["n"] for row in rows})
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))

    def slowness(name: str) -> tuple[int, int, float]:
        return min((-row["n"], -passes.index(row["pass"]), row["ratio"]) for row in rows if row["candidate"] == name)

    names = sorted(names, key=slowness) if candidates is None else [name for name in candidates if name in names]
    figure, axes = plt.subplots(1, len(passes), sharey=True, squeeze=False,
                                figsize=(WIDE, 1.35 + 0.235 * len(names)))
    ink, paper = mpl.rcParams["axes.edgecolor"], mpl.rcParams["axes.facecolor"]
    for ax, which in zip(axes[0], passes, strict=True):
        ax.axvline(1, color=ink, linewidth=1)
        for y, name in enumerate(names):
            own = sorted((row for row in rows if row["candidate"] == name and row["pass"] == which),
                         key=lambda row: row["n"])
            if not own:
                continue
            colour = _on_paper(kernel_style(own[0]["kernel"])["color"])
            ax.plot([row["ratio"] for row in own], [y] * len(own), color=colour, linestyle="-", linewidth=0.8)
            for row in own:
                ax.plot(row["ratio"], y, linestyle="none", marker=MARKERS[lengths.index(row["n"])], color=colour,
                        markerfacecolor=colour if row["who"] == "kernelbook" else paper)
        ax.set(xscale="log", title=which.replace("+", " and "))
        ax.xaxis.set_major_formatter("{x:g}")
    figure.supxlabel("time over that of torch's fused attention", fontsize=mpl.rcParams["axes.labelsize"])
    axes[0, 0].set_yticks(range(len(names)), [_plain(name.replace("_", " ")) for name in names], fontsize=9)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    marks = [Line2D([], [], color=ink, linestyle="none", marker=MARKERS[i], label=f"n = {n}")
             for i, n in enumerate(lengths)]
    figure.legend(handles=marks, loc="outside upper right", ncols=len(lengths))
    return figure


def plot_suite(
    panels: Sequence[tuple[Group, Sequence[Mapping[str, Any]]]],
    reference: str | None = None,
) -> Figure:
    """What experiments found: a dot for the mean of each variant, its confidence interval, and a tick for each seed.

    Parameters
    ----------
    panels : sequence of tuple
        The groups of a suite, each with what :func:`kernelbook.results.compare` says of it.
    reference : str, optional
        The label of the variant whose mean is drawn through the others as a line.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If no run of any group has a number.
    """
    import matplotlib.pyplot as plt

    panels = [(group, rows) for group, rows in panels if any(row["values"] for row in rows)]
    if not panels:
        raise ValueError("there is nothing to draw: no run of these has a number yet")
    labels = list(dict.fromkeys(row["label"] for _, rows in panels for row in rows))
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, sharey=True, squeeze=False,
                                figsize=(WIDE, 0.55 + down * (0.75 + 0.27 * len(labels))))
    ink = mpl.rcParams["axes.edgecolor"]
    for ax, (group, rows) in zip(axes.flat, panels, strict=False):
        for row in rows:
            y = labels.index(row["label"])
            if row["mean"] is None:
                ax.text(0.02, y, "diverged" if row["diverged"] else "", transform=ax.get_yaxis_transform(),
                        va="center", fontsize=9, style="italic")
                continue
            look = kernel_style(row["kernel"] or "", marker=True)
            colour = _on_paper(look["color"])
            if row["label"] == reference:
                ax.axvline(row["mean"], color=ink, linewidth=0.8, linestyle=":", zorder=0)
            ax.plot(list(row["values"].values()), [y] * row["n"], linestyle="none", marker="|", markersize=7,
                    color=colour, alpha=0.55)
            if row["low"] is not None:
                ax.plot([row["low"], row["high"]], [y, y], color=colour, linestyle="-", linewidth=2.2)
            ax.plot(row["mean"], y, linestyle="none", marker=look["marker"], color=colour)
            if row["diverged"]:
                ax.annotate(f"{row['diverged']} diverged", (row["mean"], y), (6, 4), textcoords="offset points",
                            fontsize=8, style="italic")
        ax.set_title(_plain(group.title))
        ax.set_xlabel(_metric_label(group))
        ax.set_yticks(range(len(labels)), [_plain(label) for label in labels], fontsize=9)
        ax.set_ylim(len(labels) - 0.4, -0.6)
    for ax in list(axes.flat)[len(panels):]:
        ax.set_visible(False)
    return figure


def _metric_label(group: Any) -> str:
    words = group.metric.removeprefix("test_").replace("_", " ")
    return f"{ {'bleu': 'BLEU'}.get(words, words) } ({'more' if group.higher_is_better else 'less'} is better)"


def describe_suite(panels: Sequence[tuple[Group, Sequence[Mapping[str, Any]]]]) -> str:
    """The alternative text of :func:`plot_suite`: its numbers, in words.

    Parameters
    ----------
    panels : sequence of tuple
        As for :func:`plot_suite`.

    Returns
    -------
    str
    """
    found = []
    for group, rows in panels:
        parts = []
        for row in rows:
            if row["mean"] is not None:
                text = f"{row['label']} {_number(row['mean'])}"
                if row["low"] is not None:
                    text += f" (from {_number(row['low'])} to {_number(row['high'])})"
                parts.append(text + (f", {row['diverged']} diverged" if row["diverged"] else ""))
            elif row["diverged"]:
                parts.append(f"{row['label']} diverged")
        if parts:
            found.append(f"{group.title}: mean {_metric_label(group)} with 95 % intervals: {'; '.join(parts)}.")
    return " ".join(found)


def plot_curves(panels: Sequence[tuple[Group, Sequence[Mapping[str, Any]]]], metric: str = "valid_loss") -> Figure:
    """Learning curves: the mean over seeds of each variant, and as a band all that lies between the seeds.

    While some seeds have learned and others not, values are far from normal, and a confidence interval of their mean
    would leave the range of the metric; so the band is from the least of them to the greatest.

    Parameters
    ----------
    panels : sequence of tuple
        The groups of a suite, each with what :func:`kernelbook.results.curves` says of it.
    metric : str
        What was drawn up, for the axis.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there is no curve.
    """
    import matplotlib.pyplot as plt

    panels = [(group, rows) for group, rows in panels if rows]
    if not panels:
        raise ValueError(f"there is nothing to draw: no run of these has a history of {metric}")
    labels = list(dict.fromkeys(row["label"] for _, rows in panels for row in rows))
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, squeeze=False, figsize=(WIDE, 0.3 + 2.7 * down + 0.23 * len(labels) / 3))
    cycle = mpl.rcParams["axes.prop_cycle"].by_key()
    lines = {}
    for ax, (group, rows) in zip(axes.flat, panels, strict=False):
        for row in rows:
            # Variants of one kernel would look alike in its own style, so the cycle tells them apart.
            i = labels.index(row["label"])
            shift, i = divmod(i, len(cycle["color"]))
            look = {"color": cycle["color"][i], "linestyle": LINESTYLES[(i + 3 * shift) % len(LINESTYLES)],
                    "marker": MARKERS[(i + 3 * shift) % len(MARKERS)] if len(row["steps"]) < 12 else ""}
            runs = _array(row["runs"])
            (lines[row["label"]],) = ax.plot(row["steps"], runs.mean(0), linewidth=1.4, markersize=3.5, **look)
            ax.fill_between(row["steps"], runs.min(0), runs.max(0), color=look["color"], alpha=0.15, linewidth=0)
        ax.set_title(_plain(group.title))
        ax.set(xlabel="step", ylabel=metric.replace("_", " "))
    for ax in list(axes.flat)[len(panels):]:
        ax.set_visible(False)
    figure.legend([lines[label] for label in labels], [_plain(label) for label in labels], loc="outside lower center",
                  ncols=min(3, len(labels)))
    return figure


def describe_curves(panels: Sequence[tuple[Group, Sequence[Mapping[str, Any]]]], metric: str = "valid_loss") -> str:
    """The alternative text of :func:`plot_curves`: where its curves begin and end, in words.

    Parameters
    ----------
    panels, metric
        As for :func:`plot_curves`.

    Returns
    -------
    str
    """
    found = []
    for group, rows in (panel for panel in panels if panel[1]):
        steps = rows[0]["steps"]
        ends = [(row["label"], *np.mean(row["runs"], 0)[[0, -1]]) for row in rows]
        found.append(f"{group.title}: mean {metric.replace('_', ' ')} from step {steps[0]:g} to step {steps[-1]:g}: "
                     + "; ".join(f"{label} from {_number(a)} to {_number(b)}" for label, a, b in ends) + ".")
    return " ".join(found)


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1.5 else f"{value:.3f}"


# ---------------------------------------------------------------------------------------------- how it is kept

def png(figure: Figure, *, scale: float = 2.0, colours: int | None = None) -> bytes:
    """A figure as the bytes of a PNG file, the same on every run.

    Parameters
    ----------
    figure : Figure
        What to draw. Not closed.
    scale : float
        Dots for each dot of the figure's own resolution: 2 is crisp on a fine screen.
    colours : int, optional
        At most this many colours, from 2 to 256, which makes the file several times smaller.

    Returns
    -------
    bytes

    Raises
    ------
    ValueError
        If ``colours`` is out of range.
    """
    if colours is not None and not 2 <= colours <= 256:
        raise ValueError(f"colours must be from 2 to 256, not {colours}")
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=_resolution(figure) * scale, metadata=_METADATA)
    if colours is None:
        return raw.getvalue()
    from PIL import Image  # matplotlib itself needs it

    (indices,), palette = quantise([Image.open(raw)], colours)
    return indexed_png(indices, palette)


def quantise(pictures: Sequence[Image.Image], colours: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures in a few colours that they share: pixels that were alike are alike, and white is still white.

    Parameters
    ----------
    pictures : sequence of PIL.Image.Image
        The pictures.
    colours : int
        How many colours they may have together, from 2 to 256.

    Returns
    -------
    indices : list of ndarray
        For each picture, ``(height, width)``: which colour each pixel has.
    palette : ndarray
        ``(at most colours, 3)``: red, green and blue of each colour.
    """
    from PIL import Image

    def pack(picture: Image.Image) -> np.ndarray:
        r, g, b = (np.asarray(band, dtype=np.int32) for band in picture.convert("RGB").split())
        return r << 16 | g << 8 | b

    packed = [pack(p) for p in pictures]
    place = np.zeros(1 << 24, dtype=np.int32)
    for p in packed:
        place[p] = 1
    used = np.flatnonzero(place)
    place[used] = np.arange(len(used))
    rgb = np.stack([used >> 16, used >> 8 & 255, used & 255], axis=-1).astype(np.uint8)
    if len(used) <= colours:
        return [place[p].astype(np.uint8) for p in packed], rgb

    # What covers most of the pictures is exact, and so is white; of the rest every shade counts once, however rare.
    covers = sum(np.bincount(place[p].ravel(), minlength=len(used)) for p in packed)
    covers[used == 0xFFFFFF] = covers.sum()
    order = np.argsort(-covers, kind="stable")
    exact, rest = rgb[order[: colours // 2]], rgb[order[colours // 2:]]
    few = Image.fromarray(rest[None]).quantize(colours - len(exact), Image.Quantize.MEDIANCUT)
    mixed = np.array(few.getpalette(), dtype=np.uint8).reshape(-1, 3)[: colours - len(exact)]
    palette = np.concatenate([exact, mixed])
    a, b = rgb.astype(np.float32), palette.astype(np.float32)
    nearest = ((b**2).sum(-1) - 2 * a @ b.T).argmin(-1).astype(np.uint8)
    return [nearest[place[p]] for p in packed], palette


def indexed_png(indices: np.ndarray, palette: np.ndarray, transparent: int | None = None) -> bytes:
    """A PNG file of pixels that are given by their places in a palette, one of which may stand for transparency."""
    from PIL import Image

    picture, file = Image.fromarray(indices), io.BytesIO()
    picture.putpalette(palette.ravel().tolist())
    options = {} if transparent is None else {"transparency": transparent}
    picture.save(file, format="png", optimize=True, **options)
    return file.getvalue()


def save(figure: Figure, path: str | Path, *, scale: float = 2.0, colours: int | None = None) -> Path:
    """Write a figure to a PNG file, the same on every run.

    Parameters
    ----------
    figure : Figure
        What to write.
    path : str or Path
        Where to; the name must end in ``.png``.
    scale, colours
        As in :func:`png`.

    Returns
    -------
    Path
        Where it was written.

    Raises
    ------
    ValueError
        If the name ends otherwise.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are kept as PNG, so the name must end in .png: {path}")
    path.write_bytes(png(figure, scale=scale, colours=colours))
    return path


# --------------------------------------------------------------------------------------------------- details

def _resolution(figure: Figure) -> float:
    return getattr(figure, "_original_dpi", figure.dpi)                # a fine screen may have doubled figure.dpi


def _name(kernel: Any) -> str | None:
    """The name by which a kernel was registered, or None for a combination of kernels or one not registered."""
    try:
        return kernel.to_config()["kernel"]
    except (ValueError, KeyError):
        return None


def _array(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):                                           # a tensor, perhaps with a gradient
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=float)


def _matrix(x: Any, name: str, rows: Sequence[str] | None, columns: Sequence[str] | None) -> np.ndarray:
    a = _array(x)
    if a.ndim != 2:
        mend = "; pick one matrix of the batch, such as one head" if a.ndim > 2 else ""
        raise ValueError(f"{name} must be a matrix (n, m), not of shape {a.shape}{mend}")
    if a.size == 0:
        raise ValueError(f"{name} is empty: shape {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError(f"{name} holds {(~np.isfinite(a)).sum()} entries that are NaN or infinite")
    for which, labels, size in (("rows", rows, a.shape[0]), ("columns", columns, a.shape[1])):
        if labels is not None and len(labels) != size:
            hint = "; rows label queries and columns label keys" if rows and columns and (
                len(rows), len(columns)) == a.shape[::-1] else ""
            raise ValueError(f"{name} has shape {a.shape}, but there are {len(labels)} labels for the {which}{hint}")
    return a


def _map(a: np.ndarray, rows: Sequence[str] | None, columns: Sequence[str] | None, ax: Axes | None, **look: Any):
    import matplotlib.pyplot as plt

    n, m = a.shape
    if ax is None:
        cell = np.clip(4.2 / max(n, m), 0.02 if rows is None and columns is None else 0.16, 0.42)      # inches
        beside = max((len(str(t)) for t in rows or ()), default=2) * 0.085 + 1.25
        above = max((len(str(t)) for t in columns), default=0) * 0.075 if _crowded(columns, cell) else 0.2
        _, ax = plt.subplots(figsize=(min(WIDE, max(3.2, m * cell + beside)), max(2.2, n * cell + above + 0.65)))
    image = ax.imshow(a, aspect="equal", **look)
    ax.grid(False)
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.6, color="#9a9a9a")
    for axis, labels, size in ((ax.yaxis, rows, n), (ax.xaxis, columns, m)):
        if labels is not None:
            axis.set_ticks(range(size), [_plain(t) for t in labels])
            axis.set_ticks(np.arange(0.5, size - 1), minor=True)       # between the cells, to lead the eye
    if rows is not None or columns is not None:
        ax.grid(which="minor", color="#e4e4e4", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    if columns is not None:
        width = ax.get_window_extent().width / _resolution(ax.figure) / m
        if _crowded(columns, width):
            ax.tick_params(axis="x", rotation=90 if width < 0.3 else 60)
            if width >= 0.3:
                for text in ax.get_xticklabels():
                    text.set(ha="left", rotation_mode="anchor")
    return image


def _crowded(labels: Sequence[str] | None, cell: float) -> bool:
    """Whether labels written side by side would touch, given the width of a cell in inches."""
    return labels is not None and max((len(str(t)) for t in labels), default=0) * 0.095 > 0.92 * cell


def _plain(token: Any) -> str:
    return str(token).replace("$", r"\$")                              # a token is text, never mathematics


def _finish_map(image: Any, title: str | None, row_label: str, column_label: str, colorbar: bool, what: str) -> Axes:
    ax = image.axes
    ax.set(xlabel=column_label, ylabel=row_label)
    if title:
        ax.set_title(_plain(title) if title.count("$") == 1 else title)
    if colorbar:
        height, width = image.get_array().shape
        # an inset is exactly as high as the map, whatever the shape of the map and of the figure
        bar = ax.figure.colorbar(image, cax=ax.inset_axes([1.04, 0, 0.035 * max(1, height / width), 1]), label=what)
        bar.outline.set_linewidth(0.6)
        bar.ax.grid(False)
    return ax
