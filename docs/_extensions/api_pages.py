"""The API reference: a page for each package of gflowgr, written when the site is built.

A page describes every public module of its package where the objects are defined. References to
the shorter names under which packages export them (``gflowgr.tb_loss``) lead there too.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import gflowgr

FOLDER = "api"
_HEAD = """\
# API reference

Written from the docstrings when the site is built. What `import gflowgr` offers:

{exports}

A page for each package, with all of its public modules:

```{{toctree}}
:maxdepth: 1

{pages}
```
"""
_MODULE = """\
```{{eval-rst}}
.. automodule:: {name}
   :members:
   :ignore-module-all:
```

"""


def modules() -> dict[str, list[str]]:
    """Public modules by package, both by name; ``gflowgr`` holds those that are in no package."""
    found: dict[str, list[str]] = {"gflowgr": []}
    for info in pkgutil.walk_packages(gflowgr.__path__, "gflowgr."):
        parts = info.name.split(".")
        if any(part.startswith("_") for part in parts) or parts[1] == "kernels":
            continue  # Triton kernels: not importable everywhere
        if len(parts) > 2 or info.ispkg:
            found.setdefault(f"gflowgr.{parts[1]}", []).append(info.name)
        else:
            found["gflowgr"].append(info.name)
    return {package: names for package, names in found.items() if names}


def write_pages(app: Sphinx) -> None:
    """Write ``docs/api``; pages that would not change are left alone."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {}
    for package, names in modules().items():
        text = f"# {package}\n\n"
        for name in names:
            text += "" if name == package else f"## {name}\n\n"
            text += _MODULE.format(name=name)
        pages[package] = text
    exports = ", ".join(f"{{py:obj}}`gflowgr.{name}`" for name in gflowgr.__all__[1:])
    pages["index"] = _HEAD.format(exports=exports, pages="\n".join(sorted(pages)))
    for path in folder.glob("*.md"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def resolve_export(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Where an exported name is defined, for a reference by the name it is exported under."""
    if node.get("refdomain") != "py":
        return None
    module, _, name = node["reftarget"].rpartition(".")
    try:
        value = getattr(importlib.import_module(module), name)
        defined = f"{value.__module__}.{value.__qualname__}"
    except (ImportError, AttributeError, ValueError):
        return None
    entry = env.get_domain("py").objects.get(defined)
    if entry is None:
        return None
    docname = node.get("refdoc", env.docname)
    return make_refnode(app.builder, docname, entry.docname, entry.node_id, content, defined)


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before Sphinx looks for its sources."""
    app.connect("builder-inited", write_pages)
    app.connect("missing-reference", resolve_export)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
