"""Figures with a slider, which work wherever the page is read: in a notebook, in the book, from a file, in print.

The frames are drawn once, when the cell runs, and travel with the output. Moving the slider needs neither a kernel
nor a network, so a stored notebook, the rendered book and JupyterLab show the same thing, and a notebook made again
is the same, byte for byte. With a kernel at hand, :meth:`Slider.live` draws anew at every step.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import plotting

if TYPE_CHECKING:
    import ipywidgets
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ["Slider"]


class Slider:
    """A figure that depends on one parameter.

    Put it last in a cell. The reader moves it with the mouse, a finger or the arrow keys; a screen reader hears the
    value, and a description of the figure that it gives; on paper the first frame stands alone.

    What the frames draw is also stored in numbers, in the output's plain text (:attr:`drawn`): a check of the notebook
    that compares numbers to a tolerance thus covers the frames that nobody is looking at.

    Parameters
    ----------
    draw : callable
        Called with one value; draws on a new matplotlib figure and returns the figure. Fix the limits of its axes, or
        the picture jumps from frame to frame.
    values : sequence
        The values of the slider, in order; about 20 are enough.
    label : str
        What the values are, such as ``"bandwidth"``. Written beside the slider.
    alt : callable
        Called with one value; returns the sentence that says what its frame shows, for those who do not see it.
    start : int
        Index of the value shown first.
    form : str or callable
        How a value is written: a format specification, or a function to a string. By default four significant
        digits for a number.

    Raises
    ------
    TypeError
        If ``draw`` or ``alt`` is not callable.
    ValueError
        If there are no values, two are written alike, or ``start`` is not an index of them.

    Examples
    --------
    >>> def draw(h):
    ...     fig, ax = plt.subplots()
    ...     ax.plot(x, np.exp(-(x / h) ** 2))
    ...     return fig
    >>> Slider(draw, [0.1, 0.2, 0.5], label="bandwidth", alt=lambda h: f"A bell of width {h}.")  # doctest: +SKIP
    """

    def __init__(
        self,
        draw: Callable[[Any], Figure],
        values: Sequence[Any],
        *,
        label: str,
        alt: Callable[[Any], str],
        start: int = 0,
        form: str | Callable[[Any], str] = "",
    ) -> None:
        if not callable(draw):
            raise TypeError("draw must be a function of one value that returns a matplotlib figure, "
                            f"not {type(draw).__name__}")
        if not callable(alt):
            raise TypeError("alt must be a function of one value that returns what its frame shows, in words, "
                            f"not {type(alt).__name__}; for example alt=lambda h: f'The fit at bandwidth {{h}}.'")
        self.draw, self.values, self.label, self.alt = draw, list(values), label, alt
        if not self.values:
            raise ValueError(f"the slider {label!r} has no values")
        self.shown = [_write(v, form) for v in self.values]
        twice = next((s for s in self.shown if self.shown.count(s) > 1), None)
        if twice is not None:
            raise ValueError(f"the slider {label!r} has two values that are both written {twice!r}; "
                             "drop one, or give a finer form, such as form='.6g'")
        if not -len(self.values) <= start < len(self.values):
            raise ValueError(f"start must be an index of the {len(self.values)} values, not {start}")
        self.start = start % len(self.values)

    @functools.cached_property
    def _frames(self) -> list[_Frame]:
        frames = [self._frame(v, s) for v, s in zip(self.values, self.shown, strict=True)]
        sizes = {f.pixels.size for f in frames}
        if len(sizes) > 1:
            raise ValueError(f"the frames of the slider {self.label!r} differ in size: {sorted(sizes)} pixels; "
                             "let draw give every figure the same figsize")
        return frames

    def _frame(self, value: Any, shown: str) -> _Frame:
        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure
        from PIL import Image

        try:
            figure = self.draw(value)
            if not isinstance(figure, Figure):
                hint = "; end it with `return fig`" if figure is None else ""
                raise TypeError(f"draw must return a matplotlib figure, not {type(figure).__name__}{hint}")
            plt.close(figure)                                          # or the notebook shows it once more
            text = self.alt(value)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"alt must return a sentence that says what the frame shows, not {text!r}")
            picture = Image.open(io.BytesIO(plotting.png(figure, scale=_SCALE))).convert("RGB")
            return _Frame(picture, text, _drawn_by(figure))
        except Exception as error:
            error.add_note(f"while drawing the frame {self.label} = {shown} of a slider")
            raise

    @functools.cached_property
    def _files(self) -> list[bytes]:
        """The frames as PNG files: the first one shown is whole, the others hold only what differs from it."""
        from PIL import Image, ImageFilter

        indices, palette = plotting.quantise([f.pixels for f in self._frames], _COLOURS)
        whole, files = indices[self.start], []
        for i, pixels in enumerate(indices):
            if i == self.start:
                files.append(plotting.indexed_png(whole, palette))
                continue
            # with a margin, or a browser that scales the two pictures mixes old pixels into the new
            differs = Image.fromarray(np.uint8(255) * (pixels != whole)).filter(ImageFilter.BoxBlur(4))
            part = np.where(np.asarray(differs) > 0, pixels, len(palette)).astype(np.uint8)
            files.append(plotting.indexed_png(part, np.concatenate([palette, palette[-1:]]), len(palette)))
        return files

    @property
    def drawn(self) -> list[list[float]]:
        """What each frame draws, in numbers: a weighted root mean square of the coordinates of each of its lines, sets
        of points and bands, and of the cells of its maps."""
        return [f.drawn for f in self._frames]

    def live(self) -> ipywidgets.VBox:
        """The same slider drawing anew with the notebook's kernel, and at any value between if the values are numbers.

        Returns
        -------
        ipywidgets.VBox
            To be put last in a cell. Not kept in the notebook: a page without a kernel cannot show it.
        """
        import ipywidgets

        if all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in self.values):
            low, high = float(min(self.values)), float(max(self.values))
            whole = all(float(v).is_integer() for v in self.values)
            kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
            number = int if whole else float
            step = 1 if whole else (high - low) / 200 or 1.0
            knob = kind(number(self.values[self.start]), min=number(low), max=number(high), step=step,
                        description=self.label, continuous_update=False,
                        **({} if whole else {"readout_format": ".4g"}))
        else:
            knob = ipywidgets.SelectionSlider(options=list(zip(self.shown, self.values, strict=True)),
                                              index=self.start, description=self.label, continuous_update=False)
        image = ipywidgets.Image(value=self._files[self.start], format="png", width=self._size[0])

        def redraw(change: dict[str, Any]) -> None:
            picture = io.BytesIO()
            self._frame(change["new"], str(change["new"])).pixels.save(picture, format="png")
            image.value = picture.getvalue()

        knob.observe(redraw, names="value")
        return ipywidgets.VBox([knob, image])

    @property
    def _size(self) -> tuple[int, int]:
        """Width and height in the pixels of a page."""
        return tuple(round(x / _SCALE) for x in self._frames[0].pixels.size)

    def _html(self) -> str:
        label, shown, alt = (html.escape(x) for x in (self.label, self.shown[self.start], self._frames[self.start].alt))
        uris = ["data:image/png;base64," + base64.b64encode(f).decode() for f in self._files]
        data = json.dumps([["" if i == self.start else uri, shown, frame.alt] for i, (uri, shown, frame) in enumerate(
            zip(uris, self.shown, self._frames, strict=True))], ensure_ascii=False)
        data = data.replace("<", "\\u003c")                            # so that no text ends the script
        width, height = self._size
        return (
            f'<div class="kb-slider"><label>{label} '
            f'<input type="range" min="0" max="{len(self.values) - 1}" step="1" value="{self.start}" '
            # data-lm-... keeps JupyterLab from taking the arrow keys for itself
            f'autocomplete="off" data-lm-suppress-shortcuts="true" aria-label="{label}" aria-valuetext="{shown}"> '
            f'<output aria-live="off">{shown}</output></label>'
            f'<img width="{width}" height="{height}" style="display:block;max-width:100%;height:auto" '
            f'alt="{alt}" src="{uris[self.start]}"></div>\n'
            f"<script>{_SCRIPT.replace('FRAMES', data)}</script>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {
            "text/plain": f"{self!r} draws\n{self._table()}",
            "text/html": self._html(),
            "image/png": base64.b64encode(self._files[self.start]).decode(),           # for print
        }

    def _table(self) -> str:
        """``drawn`` as text; a column that is the same in all frames is said once."""
        rows, alike = self.drawn, []
        if len({len(row) for row in rows}) == 1 and len(rows) > 1:
            columns = list(zip(*rows, strict=True))
            alike = [f"{c[0]:#.5g}" for c in columns if len(set(c)) == 1]
            rows = list(zip(*(c for c in columns if len(set(c)) > 1), strict=True)) or [()] * len(rows)
        lines = [f"  {s}: " + " ".join(f"{x:#.5g}" for x in row) for s, row in zip(self.shown, rows, strict=True)]
        return "\n".join(([f"  in every frame: {' '.join(alike)}"] if alike else []) + lines)

    def __repr__(self) -> str:
        return f"Slider({self.label}: {len(self.values)} frames from {self.shown[0]} to {self.shown[-1]})"


_SCALE = 2            # crisp on a fine screen
_COLOURS = 255        # and one more for "as in the first picture"


# It runs where the output is put on a page. It finds its own figure, so any number of sliders share a page.
_SCRIPT = """(function () {
  const box = document.currentScript.previousElementSibling, frames = FRAMES;
  const [knob, value, image] = ["input", "output", "img"].map((tag) => box.querySelector(tag));
  frames[knob.defaultValue][0] = image.src;                     // whole; the others are laid over it
  image.style.background = "url(" + image.src + ") 0 0 / 100% 100% content-box";
  knob.oninput = function () {
    const [picture, written, seen] = frames[knob.value];
    image.src = picture;
    image.alt = seen;
    value.textContent = written;
    knob.setAttribute("aria-valuetext", written);
  };
})();"""


class _Frame(NamedTuple):
    pixels: Image.Image
    alt: str
    drawn: list[float]


def _write(value: Any, form: str | Callable[[Any], str]) -> str:
    if callable(form):
        return form(value)
    if form:
        return format(value, form)
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return f"{value:.4g}" if number else str(value)


def _drawn_by(figure: Figure) -> list[float]:
    """One number for each sequence of numbers that a figure draws: abscissae, ordinates, the cells of a map, ...

    Each is the root mean square with weights that grow along the sequence, so it moves when the numbers grow, shrink or
    trade places. It depends on the data only, not on fonts or on how lines are rasterised, so it is the same on every
    machine up to the rounding of the data.
    """
    points, cells = [], []
    for axes in figure.axes:
        points += [line.get_xydata() for line in axes.lines]
        points += [patch.get_patch_transform().transform(patch.get_path().vertices) for patch in axes.patches]
        cells += [image.get_array() for image in axes.images]
        for collection in axes.collections:                            # points, bands, meshes
            points += [collection.get_offsets(), *(path.vertices for path in collection.get_paths())]
            if collection.get_array() is not None:
                cells.append(collection.get_array())
    numbers = []
    for sequence in [column for p in points for column in np.asarray(p, dtype=float).T] + cells:
        x = np.ma.filled(np.ma.masked_invalid(np.ma.asarray(sequence, dtype=float)), 0.0).ravel()
        weights = np.arange(1, x.size + 1)
        numbers.append(float(np.sqrt(np.sum(weights * x**2) / weights.sum())) if x.size else 0.0)
    return numbers
