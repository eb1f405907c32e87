"""Every private name of torch and transformers that the package touches is listed with its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import PreTrainedModel, Trainer
from transformers.models.t5.modeling_t5 import T5Attention

import gflowgr

PACKAGE = Path(gflowgr.__file__).parent
ROOT = PACKAGE.parent
THEIRS = {"torch", "transformers", "peft", "accelerate", "huggingface_hub"}
# Where a private name of theirs may come from; any other is our own.
HOLDERS = (torch._C, torch.Tensor, forward_ad, nn.Module, PreTrainedModel, Trainer, T5Attention)
OF_CONFIGURATIONS = {"_attn_implementation", "_name_or_path", "_train_batch_size"}
OF_WRAPPERS = {"_orig_mod", "_original_forward"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def is_theirs(name: str) -> bool:
    return name in OF_CONFIGURATIONS | OF_WRAPPERS or any(name in dir(holder) for holder in HOLDERS)


def names_in(source: str) -> set[str]:
    """Private names that are read, written, overridden, or asked for by getattr."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef) and node.bases:
            found |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
            found |= {str(a.value) for a in node.args[1:2] if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in THEIRS:
            found |= {alias.name for alias in node.names}
    return {name for name in found if is_private(name)}


def table() -> list[tuple[set[str], list[str], list[str]]]:
    """Names, files and tests of each row of docs/numerics.md."""
    text = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    section = text.split("## Private names", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    cells = [[re.findall("`([^`]+)`", cell) for cell in row] for row in rows]
    return [(set(names), files, tests) for names, files, tests in cells]


def test_the_table_names_every_private_name_that_is_touched() -> None:
    listed = {(file, name) for names, files, _ in table() for file in files for name in names}
    touched = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in names_in(path.read_text(encoding="utf-8"))
        if is_theirs(name)
    }
    touched.discard(("ops/flow_loss/op.py", "_C"))  # the module of what is listed
    assert len(touched) > 15
    assert touched <= listed, sorted(touched - listed)


def test_files_have_the_names_and_tests_are_there() -> None:
    rows = table()
    assert len(rows) > 12
    for names, files, tests in rows:
        texts = {file: (PACKAGE / file).read_text(encoding="utf-8") for file in files}
        for file, text in texts.items():
            assert all(re.search(rf"\b{name}\b", text) for name in names), (file, names)
        for test in tests:
            assert (ROOT / test).is_file(), test
