"""Every backend of ``gflowgr::tree_walk`` against the dictionary trie; choosing and forcing one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from support.dict_trie import Catalogue, catalogues

import gflowgr
from gflowgr import backends
from gflowgr.report.info import collect_info, format_info
from gflowgr.tree import PrefixTree
from gflowgr.tree.layout import build_numpy
from gflowgr.tree.walk import tree_walk

CPU = torch.device("cpu")


def requires(name: str, device: str) -> None:
    """Skip, with the backend's own reason, where it cannot run."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    reason = backends.available_backends(device)["tree_walk"][name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


on_cpu = pytest.mark.parametrize("name", ["torch", "cpp"])
on_gpu = pytest.mark.parametrize("name", ["torch", "triton", "cuda"])


class TestWalk:
    @on_cpu
    @given(catalogue=catalogues())
    def test_equals_the_dictionary_trie(self, name: str, catalogue: Catalogue) -> None:
        requires(name, "cpu")
        self.check(name, catalogue, "cpu")

    @pytest.mark.gpu
    @on_gpu
    @given(catalogue=catalogues())
    def test_equals_the_dictionary_trie_on_a_gpu(self, name: str, catalogue: Catalogue) -> None:
        requires(name, "cuda")
        self.check(name, catalogue, "cuda")

    @staticmethod
    def check(name: str, catalogue: Catalogue, device: str) -> None:
        tree = PrefixTree.from_identifiers(catalogue.identifiers).to(device)
        oracle = catalogue.oracle
        for dtype in (torch.int32, torch.int64):
            tokens = torch.tensor(catalogue.queries, dtype=dtype, device=device)
            masks = torch.tensor(catalogue.masks, device=device)
            with gflowgr.backend(name):
                assert tree.walk(tokens).tolist() == [oracle.walk(q) for q in catalogue.queries]
                assert tree.walk(tokens, mask=masks).tolist() == [
                    oracle.walk(q, m)
                    for q, m in zip(catalogue.queries, catalogue.masks, strict=True)
                ]

    @on_cpu
    @pytest.mark.parametrize("index_bytes", [4, 8])
    def test_a_large_tree(self, name: str, index_bytes: int) -> None:
        # Large enough for several threads and blocks; every width of stored token.
        requires(name, "cpu")
        generator = np.random.default_rng(0)
        tokens = np.stack(
            [generator.integers(0, high, 20_000) for high in (50, 300, 70_000)], axis=1
        )
        tree = PrefixTree(torch.from_numpy(build_numpy(tokens, None, index_bytes)))
        assert tree.layout.token_bytes == (1, 2, 4)
        with gflowgr.backend(name):
            nodes = tree.walk(torch.from_numpy(tokens))
            assert torch.equal(tree.leaves(tokens), tree.leaf_of(torch.arange(20_000)))
            wrong = tree.walk(torch.from_numpy(np.add(tokens, [0, 0, 70_000])))
        assert torch.equal(tree.node_tokens(nodes), torch.from_numpy(tokens))
        assert torch.equal(tree.parents(nodes)[:, 1:], nodes[:, :-1])
        assert torch.equal(wrong[:, :2], nodes[:, :2])
        assert bool((wrong[:, 2] == -1).all())

    @on_cpu
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_dtypes_and_strides(self, name: str, dtype: torch.dtype) -> None:
        requires(name, "cpu")
        tree = PrefixTree.from_identifiers([(5, 9, 2), (5, 8, 1), (6, 7, 7)])
        rows = torch.tensor([[(5, 9, 2), (6, 7, 7)], [(5, 8, 2), (0, 0, 0)]], dtype=dtype)
        expected = [[[1, 4, 7], [2, 5, 8]], [[1, 3, -1], [-1, -1, -1]]]
        with gflowgr.backend(name):
            assert tree.walk(rows).tolist() == expected
            assert tree.walk(rows.flip(0).flip(0).mT.contiguous().mT).tolist() == expected
            mask = torch.ones(1, dtype=torch.bool).expand(rows.shape)
            assert tree.walk(rows, mask=mask).tolist() == expected
            assert tree.walk(rows[0, 0]).tolist() == expected[0][0]

    @on_cpu
    def test_opcheck(self, name: str) -> None:
        requires(name, "cpu")
        tree = PrefixTree.from_identifiers([(5, 9, 2), (5, 8, 1)]).buffer
        tokens = torch.tensor([[5, 9, 2], [5, 7, 2]])
        with gflowgr.backend(name):
            for mask in (None, torch.tensor([[True, True, False]] * 2)):
                torch.library.opcheck(torch.ops.gflowgr.tree_walk, (tokens, mask, tree))

    def test_compiles_as_one_graph(self) -> None:
        tree = PrefixTree.from_identifiers([(5, 9, 2), (5, 8, 1)])
        tokens = torch.tensor([[5, 9, 2], [5, 7, 2]])
        compiled = torch.compile(tree_walk, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(tokens, None, tree.buffer), tree.walk(tokens))

    @pytest.mark.parametrize("name", ["torch", "cpp"])
    def test_a_buffer_that_is_no_tree(self, name: str) -> None:
        requires(name, "cpu")
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        tree = PrefixTree.from_identifiers([(1, 2)]).buffer
        for wrong in (torch.zeros(1024, dtype=torch.uint8), torch.zeros(4), tree[:8]):
            with (
                gflowgr.backend(name),
                pytest.raises((ValueError, RuntimeError), match="prefix tree"),
            ):
                torch.ops.gflowgr.tree_walk(tokens, None, wrong)


class TestChoice:
    def test_the_fastest_that_runs_is_taken(self) -> None:
        reasons = backends.available_backends("cpu")["tree_walk"]
        expected = "cpp" if reasons["cpp"] is None else "torch"
        assert backends.resolve("tree_walk", CPU, torch.int64) == expected
        assert set(reasons) == set(backends.BACKENDS)
        assert reasons["torch"] is None

    def test_forcing_nests_and_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
        free = backends.resolve("tree_walk", CPU, torch.int64)
        with gflowgr.backend("torch"):
            assert backends.resolve("tree_walk", CPU, torch.int64) == "torch"
            with gflowgr.backend(None):
                assert backends.resolve("tree_walk", CPU, torch.int64) == free
            assert backends.forced_backend() == "torch"
        assert backends.forced_backend() is None

    def test_forcing_holds_for_one_thread(self) -> None:
        seen: list[str | None] = []
        with gflowgr.backend("torch"):
            thread = threading.Thread(target=lambda: seen.append(backends._forced.get()))
            thread.start()
            thread.join()
        assert seen == [None]

    def test_the_environment_forces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(backends.ENVIRONMENT, "torch")
        assert backends.resolve("tree_walk", CPU, torch.int64) == "torch"
        monkeypatch.setenv(backends.ENVIRONMENT, "fast")
        with pytest.raises(ValueError, match="GFLOWGR_BACKEND must be one of torch, cpp"):
            backends.resolve("tree_walk", CPU, torch.int64)

    def test_a_forced_backend_never_falls_back(self) -> None:
        tree = PrefixTree.from_identifiers([(1, 2)])
        with (
            gflowgr.backend("cuda"),
            pytest.raises(backends.BackendError, match="'cuda': runs on CUDA tensors only"),
        ):
            tree.walk(torch.tensor([[1, 2]]))
        with (
            pytest.raises(ValueError, match=r"name must be one of .* got 'fast'"),
            gflowgr.backend("fast"),
        ):
            pass

    def test_a_missing_extension_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
        monkeypatch.setattr(backends, "cpp_missing", lambda: "not built")
        assert backends.resolve("tree_walk", CPU, torch.int64) == "torch"
        with gflowgr.backend("cpp"), pytest.raises(backends.BackendError, match="not built"):
            backends.resolve("tree_walk", CPU, torch.int64)

    def test_a_gpus_tensors_that_no_kernel_takes_are_told_of_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
        monkeypatch.setattr(backends, "_warned", set())
        monkeypatch.setattr(backends, "cuda_missing", lambda: "built for sm_80")
        monkeypatch.setattr(backends, "triton_missing", lambda: "triton is not installed")
        gpu = torch.device("cuda", 0)
        with pytest.warns(RuntimeWarning, match="gflowgr::tree_walk runs as its .*built for sm_80"):
            assert backends.resolve("tree_walk", gpu, torch.int64) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backends.resolve("tree_walk", gpu, torch.int64)

    def test_a_missing_extension_is_told_once_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
        monkeypatch.setattr(backends, "cpp_missing", lambda: "the compiler c++ was not found")
        monkeypatch.setattr(backends, "_warned", set())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with gflowgr.backend("torch"):
                backends.resolve("tree_walk", CPU, torch.int64)
            assert not told  # this is meant
            for _ in range(3):
                backends.resolve("tree_walk", CPU, torch.int64)
        (message,) = (str(each.message) for each in told)
        assert "are not used" in message
        assert "slower: the compiler c++ was not found (see gflowgr info" in message

    def test_what_a_failed_build_wrote_down_is_the_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
        assert backends._why_not_built("_C").startswith("no torch was there to build with")
        (tmp_path / "_C.not_built.txt").write_text("command 'g++' failed\n")
        assert backends._why_not_built("_C") == "command 'g++' failed"


class TestInfo:
    def test_info_says_which_backend_is_used_and_why_others_are_not(self) -> None:
        info = json.loads(json.dumps(collect_info()))
        choice = info["ops"]["tree_walk"]["cpu"]
        assert choice["used"] == backends.resolve("tree_walk", CPU, torch.float32)
        text = format_info(info)
        assert f"tree_walk on cpu: {choice['used']}" in text
        assert f"torch         {torch.__version__}" in text
        assert "cuda    no: runs on CUDA tensors only" in text
        for part in ("_host", "_C", "_C_cuda"):
            assert f"\n  {part} " in text

    def test_a_backend_forced_in_vain_is_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(backends.ENVIRONMENT, "cuda")
        text = format_info(collect_info())
        assert "tree_walk on cpu: none: gflowgr::tree_walk cannot run on backend 'cuda'" in text
        assert "GFLOWGR_BACKEND=cuda" in text

    @pytest.mark.process
    def test_needs_no_optional_package(self) -> None:
        script = (
            "import sys\n"
            "for name in ('transformers', 'matplotlib', 'sklearn', 'polars'):\n"
            "    sys.modules[name] = None\n"
            "from gflowgr.report.info import collect_info, format_info\n"
            "print(format_info(collect_info()))\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "tree_walk on cpu" in done.stdout
