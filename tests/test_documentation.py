"""Every code block of README, CONTRIBUTING, docs and benchmarks does what it says.

Python runs: the blocks of a page in order, in one namespace (tests/support/documentation.py). YAML
is read by what would read it. Commands of the shell are checked against the parsers, scripts and
extras that there are; those after ``<!-- run -->`` run. A block that none of this fits says so in
``<!-- not run: REASON -->``, and is counted.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.documentation import (
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    names_of_pages,
    write_inputs,
    write_modules,
)
from support.forked_cells import forked_cells  # noqa: F401  # a fixture
from support.tiny_quickstart import make_quickstart_tiny

NOT_RUN: dict[str, int] = {}
"""Blocks of each page that say why they cannot run here."""

OTHER_LANGUAGES = {"text", "{toctree}", "{command-help}"}


def test_no_block_is_left_out_in_silence() -> None:
    known = OTHER_LANGUAGES | {"python", "yaml", "bash"}
    assert {block.language for block in blocks()} <= known
    counted: dict[str, int] = {}
    for block in blocks():
        if block.marker.startswith("not run: "):
            counted[block.page] = counted.get(block.page, 0) + 1
    assert counted == NOT_RUN
    assert len(blocks("python")) >= 12
    assert len(blocks("bash")) >= 8


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in blocks("python")))
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of_pages(page)
    if page == "docs/training.md":
        names["model"].save_pretrained("runs/quickstart/shop/seed_42/default/sft/model")
    for block in blocks("python"):
        if block.page != page or block.marker:
            continue
        # Line numbers of a traceback are those of the page.
        code = compile("\n" * block.line + block.text, block.page, "exec")
        exec(code, names)


NEEDING = [block for block in blocks("python") if block.marker.startswith("needs: ")]


@pytest.mark.parametrize("wanted", NEEDING, ids=lambda block: block.marker)
def test_python_blocks_that_need_another_library_run_where_it_is(
    wanted: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = wanted.marker.removeprefix("needs: ")
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    names = names_of_pages(wanted.page)
    first = next(block for block in blocks("python") if block.page == wanted.page)
    for block in (first, wanted):
        code = compile("\n" * block.line + block.text, block.page, "exec")
        exec(code, names)


# ---- YAML ----


def read_run(values: dict[str, Any], tmp_path: Path) -> None:
    from gflowgr.runs import RunConfig

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "out", **values}))
    RunConfig.load(path)


def read_accelerate(values: dict[str, Any], tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = tmp_path / "accelerate.yaml"
    common = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False}
    path.write_text(yaml.safe_dump({**common, **values}))
    assert load_config_from_file(str(path)).fsdp_config == values["fsdp_config"]


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_yaml_blocks_are_read_by_what_they_are_for(block: Block, tmp_path: Path) -> None:
    values = yaml.safe_load(block.text)
    write_modules(block.page, tmp_path)
    read = read_accelerate if "distributed_type" in values else read_run
    read(values, tmp_path)


TABLE_SETTING = re.compile(r"`((?:flow: |finetune: |collaborative: )?\{[a-z_]+: [^`]*\})`")


def test_settings_in_tables_are_read_too(tmp_path: Path) -> None:
    """A row's settings together make a run."""
    rows = 0
    for line in (ROOT / "docs" / "training.md").read_text().splitlines():
        found = TABLE_SETTING.findall(line)
        if not line.startswith("|") or not found:
            continue
        values: dict[str, Any] = {}
        for place, text in enumerate(found):
            if text.startswith("{"):  # the table of the baselines: its columns are the sections
                text = f"{('flow', 'finetune')[place]}: {text}"
            values.update(yaml.safe_load(text))
        read_run(values, tmp_path)
        rows += 1
    assert rows == 12


# ---- the shell ----


def parse_gflowgr(words: list[str]) -> None:
    from gflowgr.cli.command_line import _parser

    args = _parser().parse_args(words)
    config = getattr(args, "config", None)
    if config is not None and config.startswith("examples/"):
        assert (ROOT / config).is_file(), config


def parse_torchrun(words: list[str]) -> None:
    from torch.distributed.run import parse_args

    args = parse_args(words)
    assert args.module
    assert args.training_script == "gflowgr"
    parse_gflowgr(args.training_script_args)


def parse_python(words: list[str]) -> None:
    if words[:2] == ["-m", "gflowgr"]:
        parse_gflowgr(words[2:])
    elif words[:3] == ["-m", "benchmarks", "serve"]:
        from benchmarks.serve import command_parser

        command_parser().parse_args(words[3:])
    elif words[:2] == ["-m", "benchmarks"]:
        from benchmarks.__main__ import _parser
        from benchmarks.harness.running import read_shape, read_tables

        args = _parser().parse_args(words[2:])
        tables = read_tables(args.ops)
        for shape in map(read_shape, args.shapes):
            assert any(table.fits(shape) for table in tables), shape.text
    elif words[:2] == ["-m", "pytest"]:
        words = words[2:]
        if "-m" in words:
            marks = words.index("-m")
            known = (ROOT / "pyproject.toml").read_text()
            assert f'"{words[marks + 1]}: ' in known, f"no marker {words[marks + 1]}"
            del words[marks : marks + 2]
        for word in words:
            assert word.startswith("-") or (ROOT / word).exists(), word
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def parse_pip(words: list[str]) -> None:
    assert words[0] in ("install", "wheel")
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    for word in words[1:]:
        for named in re.findall(r"\[(.+)\]", word):
            for extra in named.split(","):
                assert re.search(rf"^{extra} = ", extras, re.MULTILINE), word


def parse_bash(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), script
    subprocess.run(["bash", "-n", str(script)], check=True)


def parse_uv(words: list[str]) -> None:
    if words[0] != "venv":
        assert words[0] == "pip"
        parse_pip(words[1:])


def parse_conda(words: list[str]) -> None:
    assert words[:2] in (["env", "create"], ["activate", "gflowgr"])


def parse_docker(words: list[str]) -> None:
    assert words[0] in ("build", "run")
    if words[0] == "run":
        parse_gflowgr(words[words.index("gflowgr") + 1 :])


def parse_curl(words: list[str]) -> None:
    """The endpoint is there and the body is JSON; tests/serving/test_http.py sends them."""
    source = (ROOT / "gflowgr" / "serving" / "http_api.py").read_text()
    paths = re.findall(r'@app\.[a-z]+\("([^"]+)"', source)
    patterns = [re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(path)) for path in paths]
    (address,) = [word for word in words if word.startswith("localhost:8000/")]
    path = address.removeprefix("localhost:8000")
    assert any(re.fullmatch(pattern, path) for pattern in patterns), path
    if "--json" in words:
        json.loads(words[words.index("--json") + 1])


def parse_ray(words: list[str]) -> None:
    assert words[0] in ("start", "stop")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "gflowgr": parse_gflowgr,
    "torchrun": parse_torchrun,
    "python": parse_python,
    "pip": parse_pip,
    "bash": parse_bash,
    "uv": parse_uv,
    "conda": parse_conda,
    "docker": parse_docker,
    "curl": parse_curl,
    "ray": parse_ray,
    "pre-commit": lambda words: None,
}


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.place)
def test_commands_are_what_the_programs_take(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_drawing: None,
    request: pytest.FixtureRequest,
) -> None:
    if block.marker.startswith("not run: "):
        return  # counted above
    monkeypatch.chdir(tmp_path)
    if block.marker == "run":
        write_inputs(block.page, tmp_path)
        make_quickstart_tiny(monkeypatch, tmp_path)
        request.getfixturevalue("forked_cells")
    for line in commands(block.text):
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while "=" in words[0] and not words[0].startswith("-"):
                words.pop(0)  # an environment variable
            program = words[0].removeprefix(".venv/bin/")
            assert program in COMMANDS, f"{block.place}: {program} is checked by nothing"
            try:
                COMMANDS[program](words[1:])
            except SystemExit as end:
                pytest.fail(f"{block.place}: {part.strip()}: exit code {end.code}")
            if block.marker == "run":
                from gflowgr.cli import main

                assert program == "gflowgr"
                assert main(words[1:]) == 0, part


# ---- the pages ----


def test_links_between_pages_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_files_that_pages_name_are_there() -> None:
    names = re.compile(
        r"`((?:docs|examples|benchmarks|csrc|kernels|gflowgr|tests|models|decoding|training|samplers"
        r"|rewards)/[\w./]+)`"
    )
    for path in PAGES:
        for name in names.findall(path.read_text()):
            if "X" in name:
                continue  # an op that is still to be added
            found = (ROOT / name).exists() or (ROOT / "gflowgr" / name).exists()
            assert found, f"{path.name}: {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_page_of_the_command_line_has_every_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sphinx", reason="needs the extra docs")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    import command_help

    shown = dict(command_help.helps())
    assert {"gflowgr", "gflowgr train", "gflowgr data convert"} <= shown.keys()
    assert "--set KEY=VALUE" in shown["gflowgr train"]
    table = (ROOT / "docs" / "cli.md").read_text().partition("Exit codes")[0]
    for name in shown:
        if name.count(" ") == 1:
            assert f"| `{name}" in table, name


def test_the_pages_of_the_api_have_every_public_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sphinx", reason="needs the extra docs")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    import api_pages

    listed = {name for names in api_pages.modules().values() for name in names}
    files = (ROOT / "gflowgr").rglob("*.py")
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in files]
    wanted = {
        ".".join(part).removesuffix(".__init__")
        for part in parts
        if not any(word.startswith("_") and word != "__init__" for word in part)
    }
    assert listed == wanted - {"gflowgr"}
