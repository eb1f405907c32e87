"""Classes and functions from outside the package, named ``"module:Name"`` in settings.

One rule for all kinds of them: the module is searched among the installed ones, then in the folders
that :func:`add_search_folder` was told of (that of the YAML file, and the current one).
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["SEARCH_VARIABLE", "add_search_folder", "is_outside", "load_outside", "search_path"]


SEARCH_VARIABLE = "GFLOWGR_MODULES"
"""Environment variable with further folders, for processes that a run starts."""
_FOLDERS = [place for place in os.environ.get(SEARCH_VARIABLE, "").split(os.pathsep) if place]


def is_outside(name: object) -> bool:
    """Whether a setting names something of one's own, ``"module:Name"``."""
    if not isinstance(name, str):
        return False
    module, colon, attribute = name.partition(":")
    words = [*module.split("."), attribute]
    return bool(colon) and all(word.isidentifier() for word in words)


def add_search_folder(folder: Path | str) -> None:
    """Search modules in ``folder``, too, after all others.

    Args:
        folder: such as that of a configuration file.
    """
    place = str(Path(folder).resolve())
    if place not in _FOLDERS:
        _FOLDERS.append(place)


def search_path() -> str:
    """:data:`SEARCH_VARIABLE` for a process that is to find the same modules."""
    return os.pathsep.join(dict.fromkeys([*_FOLDERS, str(Path.cwd())]))


def load_outside(name: str, setting: str) -> Any:
    """What ``"module:Name"`` names.

    Args:
        name: the module and the name in it.
        setting: what errors call it, such as ``"sampler"``.

    Raises:
        ValueError: it is not of that form, the module cannot be imported (the message lists the
            folders that were searched), or it has no such name.
    """
    if not is_outside(name):
        raise ValueError(f"{setting} must be 'module:Name'; got {name!r}")
    add_search_folder(Path.cwd())
    sys.path.extend(place for place in _FOLDERS if place not in sys.path)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise ValueError(
                f"{setting}: cannot make {name!r}: its module needs {error.name!r}, which is not "
                "installed"
            ) from error
        raise ValueError(
            f"{setting}: cannot make {name!r}: no module {module!r} is installed, or in a folder "
            f"that was searched: {', '.join(_FOLDERS)}"
        ) from error
    except ImportError as error:
        raise ValueError(f"{setting}: cannot make {name!r}: {error}") from error
    except AttributeError as error:
        raise ValueError(
            f"{setting}: cannot make {name!r}: the module {module!r} "
            f"({getattr(sys.modules.get(module), '__file__', None)}) has no {attribute!r}"
        ) from error
