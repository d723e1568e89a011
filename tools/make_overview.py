"""Draw ``book/_static/overview.png``, the picture of the README and the welcome page: one formula, four kernels.

    python tools/make_overview.py

Thirteen keys on a line with a value each.  Above, the weights that one query gives to them; below, what attention
answers to every query.  Only the kernel changes from column to column.
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch

from kernelbook import attend, plotting
from kernelbook.attention import weights

PICTURE = Path(__file__).resolve().parents[1] / "book" / "_static" / "overview.png"
COLUMNS = {"edp": "exponentiated\ndot product", "rbf": "Gaussian\n(RBF)",
           "exponentiated_intersection": "exponentiated\nintersection", "quadratic": "quadratic\n"}
QUERY = 1.0


def draw() -> plt.Figure:
    keys = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)[:, None]
    values = torch.sin(1.7 * keys) + 0.3 * keys
    queries = torch.linspace(-3.3, 3.3, 331, dtype=torch.float64)[:, None]
    asked = torch.tensor([[QUERY]], dtype=torch.float64)

    fig, axes = plt.subplots(2, 4, figsize=(7.6, 3.9), sharex=True, sharey="row", height_ratios=(1, 1.25))
    fig.suptitle(r"one formula,  $o(q)\;=\;\sum_{j}\,\kappa(q,k_j)\,v_j\;\left/\;\sum_{j}\,\kappa(q,k_j)\right.$,"
                 r"  four kernels $\kappa$", fontsize=14)
    for (above, below), (name, title) in zip(axes.T, COLUMNS.items(), strict=True):
        look = plotting.kernel_style(name)
        above.bar(keys[:, 0], weights(asked, keys, name)[0], width=0.33, color=look["color"])
        above.set_title(title, loc="center", fontsize=11.5)
        below.plot(keys, values, "o", color="#8c8c8c", markersize=4)
        below.plot(queries, attend(queries, keys, values, name), linewidth=2.6, color=look["color"], linestyle="-")
        below.plot(asked, attend(asked, keys, values, name), "o", color=plotting.INK, markersize=6)
        for ax in (above, below):
            ax.axvline(QUERY, color=plotting.INK, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
            ax.grid(False)
            ax.set(xticks=[], yticks=[], xlim=(-3.5, 3.5))
            ax.spines["left"].set_visible(False)
        below.set_xlabel("query")
        above.set_xlabel("key")
    axes[0, 0].set_ylabel("weights of\none query")
    axes[1, 0].set_ylabel("answers to\nall queries")
    return fig


if __name__ == "__main__":
    with plotting.style():
        plotting.save(draw(), PICTURE, colours=256)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1000:.0f} kB")
