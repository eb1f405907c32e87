"""With ``pip install gflowgr`` alone, commands and names say which extra they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.served_shop import write_folders

pytestmark = pytest.mark.process

# Runs every command, and asks for every name, where no optional dependency can be imported.
SCRIPT = """
import contextlib, io, json, sys, traceback

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

MODULES = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Missing())
from gflowgr.cli import main
import gflowgr

told = {}
for command in json.loads(sys.argv[2]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(command)
        except BaseException:
            code, _ = None, traceback.print_exc()
    told[" ".join(command)] = (code, error.getvalue())
for name in gflowgr.__all__:
    try:
        getattr(gflowgr, name)
    except gflowgr.GFlowGRError as error:
        told[name] = (type(error).__name__, str(error))
print(json.dumps(told))
"""


def test_every_command_and_name_says_what_to_install(tmp_path: Path) -> None:
    from gflowgr.errors import _EXTRAS

    config = tmp_path / "run.yaml"
    config.write_text("output_dir: run")
    data = tmp_path / "data"
    saved = write_folders(tmp_path / "saved")
    model = [saved["model0"], "--data", saved["data"]]
    works = [
        ["info"],
        ["data", "builtin", "--out", str(data), "--users", "50", "--items", "200"],
        ["data", "inspect", str(data)],
    ]
    train = [
        ["train", "--config", str(config)],
        ["quickstart", "--output-dir", str(tmp_path / "quick")],
        ["experiment", "smoke", "--out", str(tmp_path / "smoke")],
        ["evaluate", *model],
        ["recommend", *model, "--user", "0"],
    ]
    arguments = [json.dumps(sorted(_EXTRAS)), json.dumps([*works, *train])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for command in works:
        assert told.pop(" ".join(command)) == [0, ""]
    for command in train:
        code, error = told.pop(" ".join(command))
        assert code == 2, error
        assert error.startswith('gflowgr: error: this needs pip install "gflowgr[train]" ('), error
        assert error.count("\n") == 1
    assert {"GFlowGRTrainer", "GFlowGRConfig", "PrefixTreeLogitsProcessor"} <= told.keys()
    assert not {"fused_tb_loss", "PrefixTree", "constrained_beam_search"} & told.keys()
    for kind, message in told.values():
        assert kind == "MissingExtraError"
        assert message.startswith('this needs pip install "gflowgr[train]" (')


def test_what_is_missing_beside_the_extras_keeps_its_traceback() -> None:
    from gflowgr.errors import missing_extra

    assert missing_extra(ModuleNotFoundError("No module named 'torch'", name="torch")) is None
    assert missing_extra(ImportError("cannot import name 'x'", name="transformers")) is None
    told = missing_extra(ModuleNotFoundError("No module named 'peft.x'", name="peft.x"))
    assert str(told) == 'this needs pip install "gflowgr[lora]" (peft is not installed)'
