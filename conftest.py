"""The chapters are tests: every cell is run again, and what it shows must be what its notebook stores.

``pytest`` alone runs the library's tests and the chapters; ``pytest tests`` or ``pytest book`` one of the two.
The chapters are run by nbval, which compares strings.  Here its comparison becomes one of meaning:

* numbers agree to a relative tolerance of 1e-3 or an absolute one of 1e-6; integers and words exactly;
* pictures are decoded, and agree where they have the same size and differ little from pixel to pixel: those that a
  cell shows, and those embedded in HTML, such as the frames of a slider;
* a cell that was never run fails (nbval would not check it);
* what goes to stderr, and the state of live widgets, is no part of a chapter.

A cell may set its own tolerances, in its metadata: ``nbval: {rtol: 1e-2, atol: 1e-4, rms: 5}``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

try:
    from chapters import KERNEL_ENVIRONMENT, WIDGET_VIEW
    from nbval import plugin as nbval
    from outputs import disagreement
except ImportError:                    # without the extras "book" and "test" the library's own tests still run
    nbval = None

CELL_SECONDS = 180

if nbval is not None:
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
