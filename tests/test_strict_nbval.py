"""The check of the chapters is itself checked: one notebook in which some stored outputs are true and some are not."""

from __future__ import annotations

import base64
import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
from chapters import ROOT
from nbclient import NotebookClient
from outputs import disagreement, numbers_agree
from PIL import Image

SETUP = """\
import sys, warnings
import ipywidgets, matplotlib.pyplot as plt, numpy as np
from IPython.display import HTML, display
from IPython.core.pylabtools import print_figure
import base64

def draw(peak=1.0, marker=0.5):
    fig, ax = plt.subplots(figsize=(6.4, 3.4))
    x = np.linspace(-1, 2, 200)
    ax.plot(x, np.exp(-(x - peak) ** 2))
    ax.plot(marker, 0.5, "o", markersize=5.5)
    return fig

def embedded(fig):
    uri = base64.b64encode(print_figure(fig, dpi=60)).decode()
    plt.close(fig)
    return f'<img alt="A bell" src="data:image/png;base64,{uri}">'
"""
FIGURE = "draw(); plt.show()"
FRAMES = "HTML(embedded(draw()) + embedded(draw(0.5)))"


def text(old: str, new: str) -> Callable:
    """In the stored outputs, put one text in the place of another."""
    def change(cell):
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = output.text.replace(old, new)
            else:
                output.data = {mime: data.replace(old, new) for mime, data in output.data.items()}
    return change


def picture(change: Callable) -> Callable:
    """In the stored outputs, change the pixels of every picture, embedded ones too."""
    def encode(encoded: str) -> str:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(change(pixels))).save(file, "png")
        return base64.b64encode(file.getvalue()).decode()

    def change_all(cell):
        for output in cell.outputs:
            if "image/png" in output.data:
                output.data["image/png"] = encode(output.data["image/png"])
            if "text/html" in output.data:
                html = output.data["text/html"]
                output.data["text/html"] = re.sub(r"(?<=base64,)[\w+/=]+", lambda found: encode(found[0]), html)
    return change_all


def never_run(cell):
    cell.execution_count, cell.outputs = None, []


def tolerant(cell):
    text("0.5000", "0.5035")(cell)
    cell.metadata["nbval"] = {"rtol": 0.01}


def drop(cell):
    cell.outputs = cell.outputs[:-1]


# what a cell does · what is then done to its stored output · whether the check must accept it
CASES = {
    "unchanged text": ("print('mean', 0.5)", None, True),
    "noise of 1e-5": ("print(f'{np.pi:.6f}')", text("3.141593", "3.141624"), True),
    "a change of 0.7 %": ("print(f'{np.pi:.6f}')", text("3.141593", "3.163584"), False),
    "a change of 0.7 % in an array": ("np.array([1.0, 2.0, -3.0])", text("-3.", "-3.021"), False),
    "another word": ("print('the mean is larger')", text("larger", "smaller"), False),
    "another integer": ("print(1000)", text("1000", "1001"), False),
    "a sign": ("print(-0.25)", text("-0.25", "0.25"), False),
    "an array, padded": ("np.array([1.0, 2.0])", text("[1., 2.]", "[ 1.,  2.]"), True),
    "not a number": ("print(float('nan'))", text("nan", "1.0"), False),
    "a tolerance of its own": ("print(f'{0.5:.4f}')", tolerant, True),
    "a missing output": ("print(0.5); display(1)", drop, False),
    "a figure": (FIGURE, None, True),
    "a figure, flipped": (FIGURE, picture(lambda pixels: pixels[:, ::-1]), False),
    "a figure, cut": (FIGURE, picture(lambda pixels: pixels[:-1]), False),
    "a figure in slightly other colours": (FIGURE, picture(lambda pixels: pixels // 2 * 2), True),
    "frames in HTML": (FRAMES, None, True),
    "frames in HTML, flipped": (FRAMES, picture(lambda pixels: pixels[:, ::-1]), False),
    "other HTML": ("HTML('<b>4.5</b>')", text("<b>", "<i>"), False),
    "a cell never run": ("x = 1", never_run, False),
    "a warning": ("warnings.warn('on stderr only')", None, True),
    "a semicolon": ("draw(); plt.close();", None, True),
    "a live widget": ("ipywidgets.interact(lambda k: print(k), k=(0, 3));", None, True),
}


@pytest.fixture(scope="module")
def accepted(tmp_path_factory) -> dict[str, bool]:
    """Which of the cases the check accepts; all of them stand in one notebook."""
    folder = tmp_path_factory.mktemp("notebook")
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *(case[0] for case in CASES.values()))]
    NotebookClient(nb, kernel_name="python3").execute()
    for cell, (_, change, _) in zip(nb.cells[1:], CASES.values(), strict=True):
        if change is not None:
            before = copy.deepcopy(cell)
            change(cell)
            assert cell != before, f"the case changes nothing:\n{cell.source}"
    nbformat.write(nb, folder / "cases.ipynb")
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider",
               "-c", folder / "pytest.ini", f"--junit-xml={folder / 'report.xml'}", folder / "cases.ipynb"]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    accepted = [len(test) == 0 for test in ElementTree.parse(folder / "report.xml").iter("testcase")]
    assert len(accepted) == len(nb.cells) and accepted[0], report
    return dict(zip(CASES, accepted[1:], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_check_of_chapters(case, accepted):
    assert accepted[case] == CASES[case][2]


@pytest.mark.parametrize(("stored", "new", "agree"), [
    ("tensor([1.0000, 2.5000])", "tensor([1.0000, 2.5001])", True),
    ("1e-17", "-3e-17", True),                      # zero, up to rounding
    ("inf", "1.0", False),
    ("v1.5", "v1.6", False),                        # a version is no number
    ("0.1 0.2", "0.1", False),
    ("x1 = 3", "x2 = 3", False),
    ("2.0", "2", True),
    ("10%", "11%", False),
])
def test_numbers_in_texts(stored, new, agree):
    assert numbers_agree(stored, new) == numbers_agree(new, stored) == agree


def test_a_frame_shows_the_first_where_it_is_transparent():
    """A slider's frames hold only what differs from the first; another first frame changes them all."""
    def png(colour) -> str:
        file = io.BytesIO()
        Image.new("RGBA", (20, 10), colour).save(file, "png")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    page = f"{png('white')} {png((0, 0, 0, 0))}"
    assert disagreement("text/html", page, f"{png('white')} {png((255, 255, 255, 255))}") is None
    assert "picture 1 differs" in disagreement("text/html", page, f"{png('white')} {png('black')}")
    assert "pictures instead of" in disagreement("text/html", page, png("white"))
