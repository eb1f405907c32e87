"""YAML files as configurations: read, with environment variables and overrides put in."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import GFlowGRError

__all__ = ["ConfigError", "apply_override", "expand", "read_yaml"]


class ConfigError(GFlowGRError, ValueError):
    """A configuration that cannot be run; the message names the key."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has no sections.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text, byte {error.start:,}") from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(f"{path}: expected sections such as 'data:', got {found}")
    return values


def expand(value: Any, source: str) -> Any:
    """Replace ``${NAME}`` in every text of ``value``; errors name ``source``.

    Raises:
        ConfigError: an environment variable is not set.
    """
    if isinstance(value, dict):
        return {key: expand(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, source) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"{source}: {value!r} needs the environment variable {name}; set it")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", lookup, value)


def _parse(text: str, source: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """As in YAML 1.2, and not 1.1: ``5e-4`` is a number, ``no`` and ``on`` are texts."""

    boolean = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != boolean]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    words = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
    Loader.add_implicit_resolver(boolean, words, list("tTfF"))
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change ``values`` in place as ``"section.key=value"`` says, the value in YAML.

    Raises:
        ConfigError: it is not of that form.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r} must be section.key=value")
    target = values
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {parent} is not a section")
    target[last] = _parse(text, f"--set {override!r}")
