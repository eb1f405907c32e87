"""YAML files as configurations: read, with environment variables and overrides put in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import DataError, GFlowGRError, shown
from ..extensions import add_search_folder
from ..files import find_lone_surrogate, regular_file

__all__ = ["ConfigError", "apply_override", "expand", "read_yaml"]

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_DEPTH = 50


class ConfigError(GFlowGRError, ValueError):
    """A configuration that cannot be run; the message names the key."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, is not YAML, has no sections, or is
            more than a configuration may be (see :func:`_check_node`).
    """
    try:
        with regular_file(path).open("rb") as handle:
            raw = handle.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"{path} must be at most {_MAX_BYTES:,} bytes; got more")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise ConfigError(str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text, byte {error.start:,}") from error
    values = _parse(text, str(path))
    add_search_folder(Path(path).parent)  # for classes of one's own beside the file
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(f"{path}: must have sections such as 'data:'; got {found}")
    return values


def expand(value: Any, source: str) -> Any:
    """Replace ``${NAME}`` in every text of ``value``; errors name ``source``.

    Raises:
        ConfigError: an environment variable is not set, a text is not valid Unicode, or sections
            are nested more than 50 deep.
    """
    expanded = _expand(value, source, 0)
    lone = find_lone_surrogate(expanded)
    if lone is not None:
        raise ConfigError(f"{source}: texts must be valid Unicode; got a lone surrogate, {lone}")
    return expanded


def _expand(value: Any, source: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{source}: values must be nested at most {_MAX_DEPTH} deep; got more")
    if isinstance(value, dict):
        return {key: _expand(item, source, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, source, depth + 1) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(
                f"{source}: {shown(value)} needs the environment variable {name}; set it"
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", lookup, value)


def _parse(text: str, source: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """As in YAML 1.2, and not 1.1: ``5e-4`` is a number, ``no`` and dates are texts."""

    boolean = "tag:yaml.org,2002:bool"
    dropped = (boolean, "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in dropped]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    words = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
    Loader.add_implicit_resolver(boolean, words, list("tTfF"))
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        loader = Loader(text)  # which looks at every character
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, loader, source, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: values must be nested at most {_MAX_DEPTH} deep") from error


def _check_node(
    node: Any, loader: Any, source: str, done: dict[int, int | None], depth: int = 0
) -> int:
    """How many values a node stands for with its aliases written out.

    Before anything is built from it: a few lines of aliases of aliases stand for billions of
    values, and an alias of a node that contains it would never end.

    Args:
        node: of the YAML document.
        loader: resolves the types of plain scalars.
        source: for errors.
        done: the nodes seen so far, by id; None for those that are not finished.
        depth: of the node.

    Raises:
        ConfigError: more than 100,000 values, nested more than 50 deep, an alias of what it stands
            in, a key given twice, a number of more than 30 digits, a type that no setting has.
    """
    import yaml

    where = f"{source}: line {node.start_mark.line + 1}"
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{where}: values must be nested at most {_MAX_DEPTH} deep; got more")
    known = done.get(id(node), 0)
    if known is None:
        raise ConfigError(f"{where}: an alias (*) must not stand for what it stands in")
    if known:
        return known
    done[id(node)] = None
    count = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, loader, where)
    else:
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise ConfigError(f"{where}: values must have no type of their own; got {node.tag}")
        children = node.value
        if kind == "map":
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        line = key.start_mark.line + 1
                        raise ConfigError(
                            f"{source}: line {line}: the key {shown(key.value)} is given twice"
                        )
                    seen.add((key.tag, key.value))
            children = [each for pair in node.value for each in pair]
        for child in children:
            count += _check_node(child, loader, source, done, depth + 1)
            if count > _MAX_VALUES:
                raise ConfigError(
                    f"{where}: aliases (*) must stand for at most {_MAX_VALUES:,} values; got more"
                )
    done[id(node)] = count
    return count


def _check_scalar(node: Any, loader: Any, where: str) -> None:
    import yaml

    text = "tag:yaml.org,2002:str"
    if node.tag not in (text, loader.resolve(yaml.ScalarNode, node.value, (True, False))):
        raise ConfigError(
            f"{where}: values must have no type of their own; got {shown(node.value)} as {node.tag}"
        )
    if node.tag.endswith(("int", "float")) and len(node.value) > 30:
        raise ConfigError(
            f"{where}: numbers must have at most 30 digits; got {shown(node.value, 40)}"
        )


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change ``values`` in place as ``"section.key=value"`` says, the value in YAML.

    Raises:
        ConfigError: it is not of that form.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set must be section.key=value; got {shown(override)}")
    target = values
    *parents, last = path.split(".")
    if len(parents) > _MAX_DEPTH:
        raise ConfigError(f"--set {shown(override)}: at most {_MAX_DEPTH} sections deep")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {shown(override)}: {parent[:80]} is not a section")
    target[last] = _parse(text, f"--set {shown(override)}")
