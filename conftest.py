"""The chapters are tests: every cell is run again, and what it shows must be what its notebook stores.

``pytest`` alone runs the library's tests and the chapters; ``pytest tests`` or ``pytest book`` one of the two.
The chapters are run by nbval, which compares strings.  Here its comparison becomes one of meaning:

* numbers agree to a relative tolerance of 1e-3 or an absolute one of 1e-6; integers and words exactly;
* pictures are decoded, and agree where they have the same size and differ little from pixel to pixel: those that a
  cell shows, and those embedded in HTML, such as the frames of a slider;
* a cell that was never run fails (nbval would not check it);
* what goes to stderr, and the state of live widgets, is no part of a chapter.

A cell may set its own tolerances, in its metadata: ``nbval: {rtol: 1e-2, atol: 1e-4, rms: 20}``.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

try:
    from nbval import plugin as nbval
except ImportError:                    # without the extra "test" the library's own tests still run
    nbval = None

RTOL, ATOL = 1e-3, 1e-6
RMS = 10.0                             # of 255; text that is hinted differently gives 2 to 5, another curve 20 and more
CELL_SECONDS = 180


# ------------------------------------------------------------------------------------- comparing two outputs

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w])|(?<!\w)[-+]?(?:nan|inf)\b")
_EMBEDDED = re.compile(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)")


def numbers_agree(stored: str, new: str, rtol: float = RTOL, atol: float = ATOL) -> bool:
    """Whether two texts are the same up to small differences of the numbers in them that are not integers.

    Blanks beside a number do not count: a tensor is padded to the width of its widest entry.
    """
    if stored == new:
        return True
    if _words(stored) != _words(new):
        return False
    return all(_close(a, b, rtol, atol) for a, b in zip(_NUMBER.findall(stored), _NUMBER.findall(new), strict=True))


def _words(text: str) -> list[str]:
    return [" ".join(part.split()) for part in _NUMBER.split(text)]


def _close(a: str, b: str, rtol: float, atol: float) -> bool:
    if a == b:
        return True
    if not any(mark in (a + b).lower() for mark in ".en"):           # two integers; "n" is for nan and inf
        return False
    x, y = float(a), float(b)
    return math.isclose(x, y, rel_tol=rtol, abs_tol=atol) or (math.isnan(x) and math.isnan(y))


def picture_distance(stored: str, new: str) -> float:
    """The root-mean-square difference of two pictures in base64, of 255; infinite where their sizes differ."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(s))).convert("RGBA"), dtype=float) for s in (stored, new))
    return math.inf if a.shape != b.shape else float(np.sqrt(np.mean((a - b) ** 2)))


def disagreement(mime: str, stored, new, rtol: float = RTOL, atol: float = ATOL, rms: float = RMS) -> str | None:
    """What is wrong with a new output of this type, or None where it agrees with the stored one."""
    if mime in ("image/png", "image/jpeg"):
        distance = picture_distance(stored, new)
        return None if distance <= rms else f"pictures differ by {distance:.1f} of 255 (RMS); {rms:g} is allowed"
    if not isinstance(stored, str) or not isinstance(new, str):
        return None if stored == new else f"{new!r} instead of {stored!r}"
    pictures = _EMBEDDED.findall(stored), _EMBEDDED.findall(new)
    if len(pictures[0]) != len(pictures[1]):
        return f"{len(pictures[1])} embedded pictures instead of {len(pictures[0])}"
    for number, (a, b) in enumerate(zip(*pictures, strict=True)):
        if a != b and (distance := picture_distance(a, b)) > rms:
            return f"embedded picture {number} differs by {distance:.1f} of 255 (RMS); {rms:g} is allowed"
    a, b = (_EMBEDDED.sub("PICTURE", text) for text in (stored, new))
    return None if numbers_agree(a, b, rtol, atol) else f"stored:\n{a}\nnow:\n{b}"


# ------------------------------------------------------------------------------------- nbval, made strict

if nbval is not None:
    from chapters import KERNEL_ENVIRONMENT, WIDGET_VIEW

    IGNORED = {WIDGET_VIEW, "application/vnd.jupyter.widget-state+json"}

    class Chapter(nbval.IPyNbFile):
        """A notebook, run in the environment that its outputs were made in."""

        def collect(self):
            for cell in super().collect():
                yield Cell.from_parent(self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell,
                                       options=cell.options)

        def setup(self):
            with mock.patch.dict(os.environ, KERNEL_ENVIRONMENT):
                super().setup()
            client = self.kernel.kc

            def execute(source, allow_stdin=None):       # nbval runs cells without history, and then "x;" shows x
                return client.execute(source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False)

            self.kernel.execute_cell_input = execute
            self._capturing: dict[str, bool] = {}        # the Output widgets, and whether each is capturing now

        def get_kernel_message(self, timeout=None, stream="iopub"):
            """The kernel's next message that concerns a cell's output; what a widget captures does not."""
            while True:
                message = super().get_kernel_message(timeout=timeout, stream=stream)
                kind, content = message["msg_type"], message["content"]
                if kind in ("comm_open", "comm_msg"):
                    widget, state = content.get("comm_id"), content.get("data", {}).get("state", {})
                    if kind == "comm_open" and state.get("_model_name") == "OutputModel":
                        self._capturing[widget] = False
                    if widget in self._capturing and "msg_id" in state:
                        self._capturing[widget] = bool(state["msg_id"])
                shown = kind in ("display_data", "execute_result", "stream", "update_display_data", "clear_output")
                if not (shown and any(self._capturing.values())):
                    return message

    class Cell(nbval.IPyNbCell):
        """A code cell; it fails where what it shows now differs from what is stored."""

        def runtest(self):
            if self.cell.source.strip() and self.cell.execution_count is None and not self.options["skip"]:
                raise nbval.NbCellError(self.cell_num, "the cell was never run: make notebooks", self.cell.source)
            super().runtest()

        def compare_outputs(self, test, ref, skip_compare=None):
            stored, new = self._shown(ref), self._shown(test)
            self.comparison_traceback = []
            if [mimes.keys() for mimes in stored] != [mimes.keys() for mimes in new]:
                self.comparison_traceback.append(f"stored outputs: {[sorted(m) for m in stored]}\n"
                                                 f"now: {[sorted(m) for m in new]}")
                return False
            tolerances = self.cell.metadata.get("nbval", {})
            for number, (a, b) in enumerate(zip(stored, new, strict=True)):
                for mime in a:
                    problem = disagreement(mime, self.sanitize(a[mime]), self.sanitize(b[mime]), **tolerances)
                    if problem:
                        self.comparison_traceback.append(f"output {number}, {mime}: {problem}")
            return not self.comparison_traceback

        @staticmethod
        def _shown(outputs) -> list[dict]:
            """What a reader sees of a cell's outputs: per output, the text or picture of each type."""
            shown = []
            for output in outputs:
                if output.output_type == "stream":
                    mimes = {} if output.name == "stderr" else {output.name: output.text}
                elif output.output_type == "error":
                    mimes = {"error": f"{output.ename}: {output.evalue}"}
                else:
                    mimes = {mime: data for mime, data in output.data.items() if mime not in IGNORED}
                if mimes:
                    shown.append(mimes)
            return shown

    def pytest_configure(config: pytest.Config) -> None:
        if not (config.option.nbval or config.option.nbval_lax):
            config.option.nbval = True
            config.option.nbval_current_env = True
            config.option.nbval_cell_timeout = CELL_SECONDS
            config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_file(file_path: Path, parent: pytest.Collector):
        found = yield
        return [Chapter.from_parent(parent, path=file_path) if type(node) is nbval.IPyNbFile else node
                for node in found]
