"""Which files are pages, and one set of TeX macros for all of them.

The text of a chapter lies beside the executed notebook made from it.  The notebook is the page, so the texts are
kept from Sphinx, by the same rule that everything else goes by (``tools/chapters.py``).  The macros of
``book/macros.yml`` go to MathJax and to LaTeX.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from chapters import chapters, macros  # noqa: E402


def exclude_texts(app: Sphinx, config: Config) -> None:
    texts = [text.relative_to(app.srcdir).as_posix() for text in chapters(Path(app.srcdir) / "book")]
    config.exclude_patterns = [*config.exclude_patterns, *texts]


def share_macros(app: Sphinx, config: Config) -> None:
    table = macros()
    tex = config.mathjax3_config.setdefault("tex", {})
    tex["macros"] = {name: [definition, n] if n else definition for name, (definition, n) in table.items()}
    config.latex_elements["preamble"] = config.latex_elements.get("preamble", "") + "\n".join(
        rf"\providecommand{{\{name}}}{{}}\renewcommand{{\{name}}}{f'[{n}]' if n else ''}{{{definition}}}"
        for name, (definition, n) in table.items())


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", exclude_texts)
    app.connect("config-inited", share_macros)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
