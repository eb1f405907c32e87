"""What can be checked of a build without a GPU: nvcc, Triton's compiler, installs, imports."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from itertools import product
from pathlib import Path

import pytest
from support.served_shop import write_folders
from support.tiny_decoder import make_decoder

from gflowgr import backends

ROOT = Path(__file__).parents[1]
CUDA_SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree"),
]


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("nvcc was not found")
    return found


# One in every run; the others' code differs in registers and instructions only, and takes minutes.
ARCHITECTURES = [
    pytest.param((90,), id="90"),
    pytest.param((80, 100, 120), marks=pytest.mark.slow, id="others"),
]


@pytest.mark.parametrize("capabilities", ARCHITECTURES)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_without_torch(
    source: Path, capabilities: tuple[int, ...], tmp_path: Path
) -> None:
    """Bare kernels: one nvcc call, no torch headers, no warnings, no register spills."""
    targets = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in capabilities]
    done = subprocess.run(
        [
            *(nvcc(), "-std=c++17", "-O3", "-c", "-Werror", "all-warnings", "-Xptxas", "-v"),
            *(*targets, f"-I{ROOT / 'csrc'}", str(source), "-o", str(tmp_path / "kernel.o")),
        ],
        capture_output=True,
        text=True,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    spills = report.count("bytes spill stores")
    assert spills == report.count(" 0 bytes spill stores") >= len(capabilities), report


# Per kernel: the signatures that its launcher makes, with the constants that go with them.
# dense_tiles_kernel has a test of its own below.
TRITON_SIGNATURES: dict[str, list[tuple[dict[str, str], dict[str, object]]]] = {
    "logprobs_dense.rows.dense_combine_kernel": [
        (
            {
                **dict.fromkeys(("maxima", "sums", "picked"), "*fp32"),
                "targets": "*i64",
                "reference": scores,
                **dict.fromkeys(("lse", "log_pf"), "*fp32"),
                "totals": scores,
                "missed": scores.replace("fp", "i"),
                **dict.fromkeys(("rows", "tiles", "columns", "first_column"), "i32"),
                **dict.fromkeys(("ROWS", "TILES"), "constexpr"),
            },
            {
                **({} if scores == "*fp32" else dict.fromkeys(("reference", "totals", "missed"))),
                "ROWS": 32,
                "TILES": 32,
            },
        )
        for scores in ("*fp32", "constexpr")
    ],
    "logprobs_dense.rows.dense_factors_kernel": [
        (
            {
                "scores": f"*{'bf16' if state == 'fp16' else state}",
                "hidden": f"*{state}",
                "targets": "*i64",
                **dict.fromkeys(("totals", "log_pf"), "*fp32"),
                "grad": "*fp32" if full else "constexpr",
                "factors": "*fp32",
                "scaled": f"*{'bf16' if state == 'fp16' else state}" if full else "constexpr",
                **dict.fromkeys(("rows", "columns", "width"), "i32"),
                **dict.fromkeys(("scores_stride", "hidden_stride"), "i32"),
                "scale": "fp32",
                **dict.fromkeys(("ROWS", "DEPTH"), "constexpr"),
            },
            {
                **({} if full else {"grad": None, "scaled": None}),
                "ROWS": 16,
                "DEPTH": 128,
            },
        )
        for state in ("fp32", "bf16", "fp16")
        for full in (True, False)
    ],
    "tree.walk.tree_walk_kernel": [
        (
            {
                "tokens": f"*{token}",
                "mask": "*u8",
                "tree": "*u8",
                "nodes": "*i64",
                "rows": "i64",
                "columns": "i32",
                "HAS_MASK": "constexpr",
                "BLOCK": "constexpr",
            },
            {"HAS_MASK": token == "i64", "BLOCK": 128},
        )
        for token in ("i32", "i64")
    ],
}


def test_every_triton_kernel_is_compiled_below() -> None:
    if backends.triton_missing() is not None:
        pytest.skip(f"triton: {backends.triton_missing()}")
    names = set()
    for file in (ROOT / "kernels").glob("*/[!_]*.py"):
        place = f"{file.parent.name}.{file.stem}"
        module = importlib.import_module(f"gflowgr.kernels.{place}")
        names |= {f"{place}.{name}" for name in vars(module) if name.endswith("_kernel")}
    assert names == {*TRITON_SIGNATURES, "logprobs_dense.tiles.dense_tiles_kernel"}


@pytest.mark.parametrize("capabilities", ARCHITECTURES)
@pytest.mark.parametrize("kernel", TRITON_SIGNATURES)
def test_triton_compiles_without_a_gpu(kernel: str, capabilities: tuple[int, ...]) -> None:
    if backends.triton_missing() is not None:
        pytest.skip(f"triton: {backends.triton_missing()}")
    if backends.triton_interpreted():
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET)")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel.rpartition(".")
    function = getattr(importlib.import_module(f"gflowgr.kernels.{module}"), name)
    for capability, (signature, constants) in product(capabilities, TRITON_SIGNATURES[kernel]):
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024, "shared memory of the smallest of these GPUs"


# Shared memory that one block may have, in KiB (CUDA programming guide, compute capabilities).
SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}


def dense_tiles_calls(capability: int, dtype: str) -> list[tuple[str, int, str]]:
    """(epilogue, rows, what else) of launches in logprobs_dense/launch.py; odd ones once only."""
    calls = [(epilogue, 4096, "") for epilogue in ("STATS", "SCORES", "GRAD")]
    if dtype in ("fp32", "bf16"):
        calls += [("SCORES", rows, "") for rows in (1, 33)]
    if dtype == "bf16":
        calls += [("SCORES", 4096, "redo")]
    if (dtype, capability) == ("bf16", 90):
        calls += [("SCORES", 4096, "bias"), ("GRAD", 4096, "odd width")]
    return calls


# Each dtype and each architecture in every run; all pairs of them among the slow tests.
EVERY_RUN = {("fp32", 80), ("bf16", 90), ("fp16", 100), ("tf32", 120), ("tf32x3", 90)}


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        pytest.param(*pair, marks=() if pair in EVERY_RUN else pytest.mark.slow)
        for pair in product(("fp32", "tf32", "tf32x3", "bf16", "fp16"), SHARED_KIB)
    ],
)
def test_dense_tiles_compile_without_a_gpu(dtype: str, capability: int) -> None:
    """In the configuration that such a GPU takes first (or of three TF32 products), aligned."""
    if backends.triton_missing() is not None:
        pytest.skip(f"triton: {backends.triton_missing()}")
    if backends.triton_interpreted():
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET)")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gflowgr.kernels.logprobs_dense import configs, launch, tiles

    operand = "fp32" if dtype.startswith("tf32") else dtype
    pointers = {
        **dict.fromkeys(("hidden", "weight", "bias"), f"*{operand}"),
        "targets": "*i64",
        **dict.fromkeys(("reference", "log_pf", "grad", "maxima", "sums", "picked"), "*fp32"),
        "out": f"*{'bf16' if operand == 'fp16' else operand}",
        "redo": "*i32",
    }
    unused = {
        "STATS": ("reference", "log_pf", "grad", "out"),
        "SCORES": ("log_pf", "grad"),
        "GRAD": ("maxima", "sums", "picked"),
    }
    for epilogue, rows, other in dense_tiles_calls(capability, dtype):
        names = configs.candidates(capability, 4 if operand == "fp32" else 2, rows)
        thirds = dtype == "tf32x3"
        config = next(
            found for name in names if (found := configs.CONFIGURATIONS[name]).thirds == thirds
        )
        even = other != "odd width"
        constants: dict[str, object] = {
            **launch.tile_constants(config, getattr(tiles, epilogue), 512 if even else 5),
            "PRECISION": {"fp32": "ieee", "tf32x3": "tf32x3"}.get(dtype, "tf32"),
            "UPCAST": False,
            "bias_stride": 1,
            **dict.fromkeys(unused[epilogue]),
            **{argument: None for argument in ("bias", "redo") if argument != other},
        }
        signature = {
            argument: "constexpr"
            if argument in constants
            else pointers.get(argument, "fp32" if argument == "scale" else "i32")
            for argument in tiles.dense_tiles_kernel.arg_names
        }
        aligned = {"hidden", "weight", "bias", "out", "out_stride"}
        if even:
            aligned |= {"columns", "width", "hidden_stride", "weight_stride"}
        compiled = triton.compile(
            ASTSource(
                fn=tiles.dense_tiles_kernel,
                signature=signature,
                constexprs=constants,
                attrs={
                    (place,): [["tt.divisibility", 16]]
                    for place, argument in enumerate(signature)
                    if argument in aligned and argument not in constants
                },
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": config.warps, "num_stages": config.stages},
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 1024 * SHARED_KIB[capability], config
        if even:
            # Loads run ahead of the products only if they are wide enough to be asynchronous.
            assert "cp.async" in compiled.asm["ptx"], config
        if capability == 90 and operand != "fp32" and rows > 16:
            assert "wgmma" in compiled.asm["ptx"], config


def test_import_is_light() -> None:
    """``import gflowgr`` costs at most 150 ms of CPU time over ``import torch``; best of three."""
    script = (
        "import sys, time, torch\n"
        "begin = time.process_time()\n"
        "import gflowgr\n"
        "print(time.process_time() - begin)\n"
    )
    seconds: list[float] = []
    while len(seconds) < 3 and not any(second < 0.150 for second in seconds):
        seconds.append(float(run_python(script)))
    assert min(seconds) < 0.150


def test_ops_import_nothing_heavy() -> None:
    script = (
        "import sys, gflowgr\n"
        "gflowgr.PrefixTree, gflowgr.tb_loss, gflowgr.trajectory_logprobs, gflowgr.backend\n"
        "heavy = {'transformers', 'matplotlib', 'sklearn', 'polars', 'pyarrow', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert run_python(script) == "[]\n"


def test_a_recommendation_imports_nothing_heavy(tmp_path: Path) -> None:
    """Not for the generators that are built here; the command line alone imports no torch."""
    folders = write_folders(tmp_path)
    models = {"tiger": folders["model0"], "decoder": str(tmp_path / "decoder")}
    make_decoder().save_pretrained(models["decoder"])
    script = (
        "import sys, gflowgr.cli\n"
        "assert 'torch' not in sys.modules\n"
        f"for model in {list(models.values())}:\n"
        f"    options = ['--data', {folders['data']!r}, '--history', '3,4', '--top', '2']\n"
        "    options += ['--json', '--no-progress']\n"
        "    assert gflowgr.cli.main(['recommend', model, *options]) == 0\n"
        "heavy = {'transformers', 'accelerate', 'torch._dynamo', 'torch.distributed.tensor',"
        " 'sympy', 'scipy', 'pyarrow', 'polars', 'matplotlib', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    *answers, heavy = run_python(script).splitlines()
    assert [len(json.loads(answer)["items"]) for answer in answers] == [2, 2]
    assert heavy == "[]"


def run_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_setup(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("GFLOWGR_")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**keep, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "warning"),
    [
        ({"GFLOWGR_NO_EXT": "1"}, "GFLOWGR_NO_EXT is set"),
        ({"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}, "failed to build and is left out"),
    ],
    ids=["switched-off", "no-compiler"],
)
def test_installs_and_works_without_compiled_parts(
    environment: dict[str, str], warning: str, tmp_path: Path
) -> None:
    built = run_setup(["build", "--build-base", str(tmp_path)], **environment)
    assert built.returncode == 0, built.stderr
    assert f"gflowgr: WARNING: {warning}" in built.stderr.replace("gflowgr._host ", "").replace(
        "gflowgr._C ", ""
    )
    packages = [folder.parent for folder in tmp_path.glob("lib*/gflowgr")]
    assert len(packages) == 1
    assert not list(packages[0].rglob("*.so"))
    notes = [path.read_text() for path in packages[0].glob("gflowgr/*.not_built.txt")]
    assert bool(notes) == ("CXX" in environment)
    assert all("no C++ compiler was found; install one, such as g++" in note for note in notes)
    script = (
        "import torch, gflowgr\n"
        f"assert gflowgr.__file__.startswith({str(tmp_path)!r}), gflowgr.__file__\n"
        "tree = gflowgr.PrefixTree.from_identifiers([(5, 9, 2), (5, 8), (5, 9, 2)])\n"
        "tree.walk(torch.tensor([[5]]))\n"
        "print(tree.walk(torch.tensor([[5, 9, 2], [5, 8, 8]])).tolist(), tree.items(1).tolist())\n"
        "print(gflowgr.available_backends('cpu')['tree_walk'])\n"
    )
    used = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(packages[0])},
        capture_output=True,
        text=True,
    )
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("[[1, 3, 4], [1, 2, -1]] [0, 2]\n")
    assert "gflowgr/_C was not built" in used.stdout
    (told,) = (line for line in used.stderr.splitlines() if "UserWarning" in line)
    assert "the C++ kernels of gflowgr are not used" in told
    # What the compiler, or ninja in its place, said.
    reason = "/nonexistent/c++" in told or "Error compiling objects" in told
    assert reason == ("CXX" in environment)


def test_cuda_that_was_asked_for_and_cannot_be_built_fails() -> None:
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    done = run_setup(["--version"], GFLOWGR_CUDA="1")
    assert done.returncode != 0
    assert "GFLOWGR_CUDA=1, but this torch has no CUDA" in done.stderr
    assert (
        run_setup(["--version"], GFLOWGR_CUDA="maybe")
        .stderr.strip()
        .endswith("GFLOWGR_CUDA='maybe', expected 0, 1 or auto")
    )


def test_sdist_and_wheel_are_complete(tmp_path: Path) -> None:
    """The sdist holds all that a build needs, and the wheel made from it all that a run needs."""
    made = run_setup(
        ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)],
        GFLOWGR_NO_EXT="1",
    )
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = [path for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*.*")]
    wanted = {str(p.relative_to(ROOT)) for p in sources if "__pycache__" not in p.parts}
    assert wanted <= names, wanted - names
    assert {"setup.py", "pyproject.toml", "gflowgr/py.typed", "LICENSE", "README.md"} <= names
    left_out = ("benchmarks/", "tests/", "docs/api", "docs/_build")
    assert not any(name.startswith(left_out) for name in names)
    assert archive.stat().st_size < 1e6, "recorded results, or something else that is not needed"

    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"),
            *("--wheel-dir", str(tmp_path), str(archive)),
        ],
        env={**os.environ, "GFLOWGR_NO_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        files = set(content.namelist())
    packaged = [*(ROOT / "gflowgr").rglob("*.py"), ROOT / "gflowgr" / "py.typed"]
    wanted = {str(path.relative_to(ROOT)) for path in packaged}
    wanted |= {f"gflowgr/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert wanted <= files, wanted - files
    assert not any(name.startswith(("tests/", "csrc/", "kernels/")) for name in files)
