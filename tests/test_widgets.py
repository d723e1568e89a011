"""Sliders: what is stored of them, and that it is right frame by frame."""

import base64
import html.parser
import io
import json
import re

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from kernelbook import plotting
from kernelbook.widgets import Slider

X = np.linspace(-1, 1, 40)


def bell(h):
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.plot(X, np.exp(-(X / h) ** 2))
    ax.set(ylim=(0, 1.1), title=f"h = {h}")
    return fig


def slider(draw=bell, values=(0.1, 0.2, 0.5), **options):
    described = {"label": "width <h>", "alt": lambda h: f"A \"bell\" of width {h}.</script>"}
    return Slider(draw, values, **described | options)


@pytest.fixture(autouse=True)
def house_style():
    with plotting.style():
        yield
    plt.close("all")


def frames(bundle):
    """What the page's script has: picture, value and description of each frame."""
    return json.loads(re.search(r"frames = (\[\[.*?\]\]);\n", bundle["text/html"], re.S)[1])


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA")


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def __getitem__(self, tag):
        (found,) = [a for t, a in self.seen if t == tag]
        return found


def test_the_output_is_the_same_on_every_run():
    first, second = (slider()._repr_mimebundle_() for _ in range(2))
    assert first == second
    assert set(first) == {"text/plain", "text/html", "image/png"}
    assert plt.get_fignums() == []                           # or the notebook would show a frame once more


def test_the_page_is_usable_from_the_keyboard_and_by_ear():
    bundle = slider(start=-1)._repr_mimebundle_()
    tags = Tags(bundle["text/html"])
    knob, image = tags["input"], tags["img"]
    assert (knob["type"], knob["min"], knob["max"], knob["value"]) == ("range", "0", "2", "2")
    assert knob["aria-label"] == "width <h>" and knob["aria-valuetext"] == "0.5"
    assert "data-lm-suppress-shortcuts" in knob             # or JupyterLab takes the arrow keys
    assert image["alt"] == "A \"bell\" of width 0.5.</script>"
    assert [(value, alt) for _, value, alt in frames(bundle)] == [
        (f"{h}", f"A \"bell\" of width {h}.</script>") for h in (0.1, 0.2, 0.5)]
    assert not any("id" in attributes for _, attributes in tags.seen)       # any number of sliders share a page
    assert bundle["text/html"].count("</script>") == 1                      # no text ends the script
    assert "http" not in bundle["text/html"]


def test_frames_laid_over_the_first_are_the_figures():
    made = slider(values=(0.1, 0.2, 0.5), start=1)
    bundle = made._repr_mimebundle_()
    whole = pixels(Tags(bundle["text/html"])["img"]["src"])
    assert base64.b64decode(bundle["image/png"]) == made._files[1]
    for (uri, _, _), value in zip(frames(bundle), made.values, strict=True):
        shown = Image.alpha_composite(whole, pixels(uri)) if uri else whole
        drawn = Image.open(io.BytesIO(plotting.png(bell(value)))).convert("RGB")
        difference = np.abs(np.asarray(shown.convert("RGB"), float) - np.asarray(drawn))
        assert difference.mean() < 0.1 and difference.max() < 40             # few colours, but the same picture
        assert (np.asarray(shown)[0, 0] == 255).all()                        # exactly white, for dark pages
        if uri:                                                              # a page that is narrower: no ghosts
            below, above, goal = (p.resize((p.width // 3, p.height // 3), Image.Resampling.BOX)
                                  for p in (whole, pixels(uri), drawn))
            shown = Image.alpha_composite(below, above).convert("RGB")
            assert np.abs(np.asarray(shown, float) - np.asarray(goal)).max() < 32


def test_twenty_frames_of_a_scatter_stay_small():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 200))

    def draw(h):
        fig, ax = plt.subplots()
        ax.plot(x, y, ".", color="#9a9a9a")
        ax.plot(X, np.exp(-(X / h) ** 2))
        ax.set(xlim=(-3, 3), ylim=(-3, 3))
        return fig

    bundle = slider(draw, np.linspace(0.1, 2, 20))._repr_mimebundle_()
    assert len(bundle["text/html"]) < 300_000


# ---- the numbers that stand for the frames

def test_the_plain_text_says_what_each_frame_draws():
    text = slider()._repr_mimebundle_()["text/plain"].splitlines()
    assert text[0] == "Slider(width <h>: 3 frames from 0.1 to 0.5) draws"
    x = float(np.sqrt(np.sum(np.arange(1, 41) * X**2) / 820))
    assert text[1] == f"  in every frame: {x:#.5g}"
    for line, h in zip(text[2:], (0.1, 0.2, 0.5), strict=True):
        y = float(np.sqrt(np.sum(np.arange(1, 41) * np.exp(-(X / h) ** 2) ** 2) / 820))
        assert line == f"  {h}: {y:#.5g}"


@pytest.mark.parametrize("change", ["curve", "points", "band", "map", "bar", "shift", "order"])
def test_a_change_of_what_is_drawn_changes_the_numbers(change):
    def draw(h, changed=None):
        fig, (left, right) = plt.subplots(1, 2)
        y = np.exp(X) * (1.01 if changed == "curve" else 1)
        left.plot(X + (0.01 if changed == "shift" else 0), y[::-1] if changed == "order" else y)
        left.scatter([1, 2], [1, 2.02 if changed == "points" else 2])
        left.fill_between(X, 0, 0.51 if changed == "band" else 0.5)
        left.bar([0], [1.01 if changed == "bar" else 1])
        right.imshow([[1, 2], [3, 4.04 if changed == "map" else 4]])
        return fig

    (before,), (after,) = (slider(lambda h, c=c: draw(h, c), [1]).drawn for c in (None, change))
    assert len(before) == len(after)
    relative = np.abs(np.array(after) - before) / (np.abs(before) + 1e-9)
    assert relative.max() > 2e-3                             # notebooks are compared to 1e-3


# ---- live, and refused

def test_live_draws_between_the_frames():
    box = slider().live()
    knob, image = box.children
    assert knob.description == "width <h>" and (knob.min, knob.max, knob.value) == (0.1, 0.5, 0.1)
    before = image.value
    knob.value = 0.33
    assert image.value != before
    drawn = Image.open(io.BytesIO(plotting.png(bell(knob.value)))).convert("RGB")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.value))), np.asarray(drawn))
    words = slider(lambda w: bell(len(w)), ["a", "bc"]).live().children[0]
    assert words.options == (("a", "a"), ("bc", "bc"))


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"values": []}, ValueError, "no values"),
    ({"values": [1.00001, 1.00002]}, ValueError, "both written '1'.*form="),
    ({"start": 3}, ValueError, "index of the 3 values"),
    ({"draw": "figure"}, TypeError, "draw must be a function"),
    ({"alt": "a bell"}, TypeError, "alt must be a function"),
])
def test_what_makes_no_slider_is_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        slider(**options)


@pytest.mark.parametrize(("options", "message"), [
    ({"draw": lambda h: None}, "return fig"),
    ({"draw": lambda h: plt.subplots()[1]}, "must return a matplotlib figure, not Axes"),
    ({"draw": lambda h: plt.figure(figsize=(3, 1 + 2 * h))}, "differ in size"),
    ({"draw": lambda h: 1 / 0}, "division by zero"),
    ({"alt": lambda h: ""}, "alt must return a sentence"),
])
def test_a_frame_that_fails_is_named(options, message):
    with pytest.raises(Exception, match=message) as failed:
        slider(**options)._repr_mimebundle_()
    if "size" not in message:
        assert failed.value.__notes__ == ["while drawing the frame width <h> = 0.1 of a slider"]
