"""The library's reference: how its annotations and docstrings read on the page, and where its names lead.

Annotations give shapes (``Float[Tensor, "... n d"]``) and are printed as they are written.  Names in annotations and
docstrings may be short, as they are in code (``Tensor``, ``Kernel``); here they find their way to the library's own
pages or to another project's.  A name that leads nowhere is still a warning, and so an error of the build.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
from functools import cache

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import PycodeError
from sphinx.ext.autodoc import DataDocumenter, ModuleDocumenter
from sphinx.ext.intersphinx import resolve_reference_any_inventory
from sphinx.pycode import ModuleAnalyzer

#: Names of other projects: as code has them, and as their own references list them.
ELSEWHERE = {
    "torch._C.Generator": "torch.Generator",
    "Tensor": "torch.Tensor",
    "Module": "torch.nn.Module",
    "nn.Module": "torch.nn.Module",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.nn.Parameter": "torch.nn.parameter.Parameter",
    "Fabric": "lightning.fabric.Fabric",
    "lightning_fabric.fabric.Fabric": "lightning.fabric.Fabric",
    "ndarray": "numpy.ndarray",
    "ArrayLike": "numpy.typing.ArrayLike",
    "Figure": "matplotlib.figure.Figure",
    "Axes": "matplotlib.axes.Axes",
    "Line2D": "matplotlib.lines.Line2D",
    "Path": "pathlib.Path",
    **{name: f"jaxtyping.{name}" for name in ("Bool", "Float", "Int")},
    **{name: f"collections.abc.{name}" for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")},
}

#: What a docstring may put where a type goes though it names no object.
WORDS = set("""
    optional callable callables function functions module sequence sequences mapping iterable iterator generator array
    arrays array-like array_like path paths tensor tensors kernel number numbers scalar any pair pairs names keyword
""".split())


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement) -> nodes.Node | None:
    """Resolve what neither Sphinx nor an inventory could under the name as it was written."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].strip("()")                     # of "pairs of (str, str)"
    if target in WORDS:
        return content
    name = ELSEWHERE.get(target, target)
    for kind in ("class", "data", node["reftype"]):        # an alias of a type is data, though it is used as a class
        query = node.copy()
        query["reftarget"], query["reftype"] = name, kind
        if found := resolve_reference_any_inventory(env, False, query, content):
            return found
    matches = {full: entry for full, entry in env.get_domain("py").objects.items()
               if full.endswith(f".{target}") and not entry.aliased}
    if len(matches) != 1:
        return None
    (full, entry), = matches.items()
    address = app.builder.get_relative_uri(node["refdoc"], entry.docname) + f"#{entry.node_id}"
    return nodes.reference("", "", content, internal=True, refuri=address, reftitle=full)


# ---------------------------------------------------------------------------------------- what autodoc gets wrong

def enumerations_take_no_arguments(app, what, name, obj, options, signature, returns):
    """Calling an enumeration looks a member up; the arguments that Python reports say nothing of it."""
    if what == "class" and isinstance(obj, type) and issubclass(obj, enum.Enum):
        return "", None
    return None


def attributes_have_no_type_prefix(app, what, name, obj, options, lines):
    """Napoleon takes what stands before a colon in an attribute's first line for its type; these are sentences."""
    if what in ("attribute", "property") and lines:
        lines[:0] = ["..", ""]              # an empty comment, which has no colon


@cache
def _constants(module: str) -> dict[str, list[str]]:
    """The constants that a module makes public, its own or its submodules', and what is said of them there."""
    loaded = importlib.import_module(module)
    submodules = [f"{module}.{info.name}" for info in pkgutil.iter_modules(getattr(loaded, "__path__", []))]
    found = {name: [] for name in getattr(loaded, "__all__", ()) if name.isupper()}
    for source in [*submodules, module]:
        try:
            described = ModuleAnalyzer.for_module(source).find_attr_docs()
        except PycodeError:
            continue
        found |= {name: lines for (owner, name), lines in described.items() if not owner and name in found}
    return found


class ConstantDocumenter(DataDocumenter):
    """A public constant of a module or package; autodoc alone drops those whose description it does not find."""

    objtype, directivetype = "constant", "data"
    priority = DataDocumenter.priority + 10

    @classmethod
    def can_document_member(cls, member, membername, isattr, parent):
        return isinstance(parent, ModuleDocumenter) and membername in _constants(parent.modname)

    def get_doc(self):
        return [_constants(self.modname)[self.objpath[-1]]]


def constants_are_members(app, what, name, obj, skip, options):
    module = app.env.temp_data.get("autodoc:module")
    return False if what == "module" and module and name in _constants(module) else None


def setup(app: Sphinx) -> dict:
    app.connect("missing-reference", resolve, priority=600)                              # after intersphinx
    app.connect("autodoc-process-signature", enumerations_take_no_arguments)
    app.connect("autodoc-process-docstring", attributes_have_no_type_prefix, priority=400)     # before napoleon
    app.add_autodocumenter(ConstantDocumenter)
    app.connect("autodoc-skip-member", constants_are_members)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
