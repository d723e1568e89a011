"""Write the small inventories by which the book links to the references of other projects.

Sphinx would download each project's whole inventory; a book that builds with no network names here the few objects
that it refers to.  A reference to anything else is an error, which says what to add.

    python tools/inventories.py
"""

from __future__ import annotations

import zlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "book" / "_inventories"

#: Per project: name and version, then rows of (object type, address with $ for the name, names).
INVENTORIES = {
    "python": ("Python", "3", [
        ("py:class", "library/stdtypes.html#$",
         "str bytes int float bool complex list tuple dict set frozenset range type"),
        ("py:class", "library/functions.html#$", "object"),
        ("py:exception", "library/exceptions.html#$",
         "Exception ValueError TypeError KeyError IndexError RuntimeError NotImplementedError OSError "
         "FileNotFoundError FileExistsError KeyboardInterrupt ImportError ArithmeticError FloatingPointError "
         "AssertionError ConnectionError PermissionError StopIteration UserWarning RuntimeWarning LookupError "
         "AttributeError"),
        ("py:class", "library/exceptions.html#$", "ValueError TypeError KeyError RuntimeError OSError Exception"),
        ("py:class", "library/enum.html#$", "enum.Enum enum.StrEnum enum.IntEnum"),
        ("py:class", "library/pathlib.html#$", "pathlib.Path pathlib.PurePath"),
        ("py:class", "library/os.html#$", "os.PathLike"),
        ("py:class", "library/datetime.html#$", "datetime.datetime datetime.date datetime.timedelta"),
        ("py:class", "library/abc.html#$", "abc.ABC"),
        ("py:class", "library/collections.html#$", "collections.Counter collections.OrderedDict collections.deque"),
        ("py:class", "library/collections.abc.html#$",
         "collections.abc.Callable collections.abc.Iterable collections.abc.Iterator collections.abc.Mapping "
         "collections.abc.MutableMapping collections.abc.Sequence collections.abc.Generator collections.abc.Sized "
         "collections.abc.Collection collections.abc.Set collections.abc.Hashable"),
        ("py:class", "library/typing.html#$",
         "typing.Any typing.Literal typing.NamedTuple typing.Protocol typing.Generic typing.TypeVar"),
        ("py:data", "library/typing.html#$", "typing.Any typing.Literal typing.Optional typing.Union"),
        ("py:data", "library/constants.html#$", "None True False NotImplemented Ellipsis"),
        ("py:function", "library/functions.html#$", "print len abs sum min max repr zip"),
        ("py:module", "library/$.html", "dataclasses math"),
    ]),
    "numpy": ("NumPy", "2", [
        ("py:class", "reference/generated/$.html#$", "numpy.ndarray numpy.dtype numpy.random.Generator numpy.generic"),
        ("py:class", "reference/typing.html#$", "numpy.typing.ArrayLike numpy.typing.NDArray"),
        ("py:data", "reference/typing.html#$", "numpy.typing.ArrayLike numpy.typing.NDArray"),
    ]),
    "jaxtyping": ("jaxtyping", "0.3", [
        ("py:class", "api/array/", "jaxtyping.Float jaxtyping.Int jaxtyping.Bool jaxtyping.Integer jaxtyping.Shaped "
                                   "jaxtyping.Num jaxtyping.Real jaxtyping.Inexact jaxtyping.Complex jaxtyping.UInt8"),
    ]),
    "matplotlib": ("Matplotlib", "3", [
        ("py:class", "api/figure_api.html#$", "matplotlib.figure.Figure"),
        ("py:class", "api/_as_gen/$.html#$", "matplotlib.axes.Axes matplotlib.lines.Line2D"),
    ]),
    "ipywidgets": ("ipywidgets", "8", [
        ("py:class", "examples/Widget%20List.html#VBox", "ipywidgets.VBox"),
    ]),
    "lightning": ("Lightning Fabric", "2", [
        ("py:class", "api/generated/lightning.fabric.fabric.Fabric.html#lightning.fabric.fabric.Fabric",
         "lightning.fabric.Fabric"),
    ]),
    "torch": ("PyTorch", "2", [
        ("py:class", "tensors.html#$", "torch.Tensor"),
        ("py:class", "tensor_attributes.html#$", "torch.dtype torch.device"),
        ("py:class", "generated/$.html#$",
         "torch.Generator torch.nn.Module torch.nn.MultiheadAttention torch.nn.Linear torch.nn.Embedding "
         "torch.nn.LayerNorm torch.nn.Dropout torch.nn.ParameterList torch.optim.AdamW"),
        ("py:class", "generated/torch.nn.parameter.Parameter.html#$", "torch.nn.parameter.Parameter"),
        ("py:class", "optim.html#$", "torch.optim.Optimizer"),
        ("py:class", "data.html#$", "torch.utils.data.Dataset torch.utils.data.DataLoader torch.utils.data.Sampler"),
        ("py:function", "generated/$.html#$",
         "torch.nn.functional.scaled_dot_product_attention torch.nn.functional.softmax torch.softmax torch.finfo "
         "torch.manual_seed torch.compile torch.einsum torch.linalg.eigvalsh torch.cdist"),
    ]),
}


def write(folder: Path = FOLDER) -> None:
    """Write one inventory a project, in Sphinx's format (version 2)."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, (project, release, groups) in INVENTORIES.items():
        head = (f"# Sphinx inventory version 2\n# Project: {project}\n# Version: {release}\n"
                "# The remainder of this file is compressed using zlib.\n")
        rows = {f"{name} {kind} 1 {address} -" for kind, address, names in groups for name in names.split()}
        body = "".join(f"{row}\n" for row in sorted(rows))
        (folder / f"{key}.inv").write_bytes(head.encode() + zlib.compress(body.encode(), 9))


if __name__ == "__main__":
    write()
