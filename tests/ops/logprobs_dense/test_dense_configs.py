"""Which tile sizes the dense head runs with, tested with a fake GPU and fake timings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gflowgr import backends

if backends.triton_missing() is not None:
    pytest.skip(f"triton: {backends.triton_missing()}", allow_module_level=True)

from gflowgr.kernels.logprobs_dense import configs as dense_configs
from gflowgr.kernels.logprobs_dense import launch
from gflowgr.kernels.logprobs_dense.configs import CONFIGURATIONS, Configuration

SHAPE = (4096, 33024, 512)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Pretend to be an H100 on which the last candidate is fastest; lists what was timed."""
    monkeypatch.setenv(dense_configs.CACHE_FOLDER, str(tmp_path))
    monkeypatch.delenv(dense_configs.TUNE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls: list[list[str]] = []

    def fastest(names: list[str], run: object) -> str:
        calls.append(names)
        return names[-1]

    monkeypatch.setattr(dense_configs, "_fastest", fastest)
    dense_configs.forget()
    yield calls
    dense_configs.forget()


def choose(shape: tuple[int, int, int] = SHAPE) -> Configuration:
    return dense_configs.choose(1, torch.bfloat16, torch.device("cuda"), shape, lambda config: None)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 64, 10_000])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_gpu_has_a_configuration_that_fits(capability: int, rows: int, itemsize: int) -> None:
    names = dense_configs.candidates(capability, itemsize, rows)
    assert names
    for name in names:
        config = CONFIGURATIONS[name]
        assert config.shared_bytes(itemsize) < dense_configs.shared_limit(capability)
        assert all(size & (size - 1) == 0 and size >= 16 for size in config[:3])


def test_times_once_and_remembers_on_disk(timed: list[list[str]], tmp_path: Path) -> None:
    chosen = choose()
    assert chosen == CONFIGURATIONS[timed[0][-1]]
    assert choose((4000, 40000, 512)) == chosen  # the same powers of two
    assert len(timed) == 1
    dense_configs.forget()  # a new process
    assert choose() == chosen
    assert len(timed) == 1
    (file,) = tmp_path.iterdir()
    ((key, name),) = json.loads(file.read_text()).items()
    assert "Pretended" in key
    assert CONFIGURATIONS[name] == chosen
    choose((4096, 33024, 128))
    assert len(timed) == 2
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": "b"}', None])
def test_a_damaged_file_is_made_again(
    timed: list[list[str]], tmp_path: Path, content: str | None
) -> None:
    choose()
    (file,) = tmp_path.iterdir()
    # None: as written by us, but with a name that is gone.
    keys = json.loads(file.read_text())
    file.write_text(json.dumps(dict.fromkeys(keys, "gone")) if content is None else content)
    dense_configs.forget()
    choose()
    assert len(timed) == 2
    assert json.loads(file.read_text()).items() >= keys.items()


def test_nothing_is_timed_where_it_must_not_be(
    timed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = CONFIGURATIONS[dense_configs.candidates(90, 2, SHAPE[0])[0]]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == default
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv(dense_configs.TUNE, "0")
    assert choose() == default
    monkeypatch.delenv(dense_configs.TUNE)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose() == default
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    # Ranks that time by themselves may choose differently.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert choose() == default
    assert not timed
    assert not list(tmp_path.iterdir())


def test_what_was_timed_with_other_kernels_is_timed_again(
    timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose()
    dense_configs.forget()
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path: read(path) + ("# changed" if path.name == "tiles.py" else ""),
    )
    dense_configs._version.cache_clear()
    choose()
    dense_configs._version.cache_clear()
    assert len(timed) == 2


def test_three_products_of_tf32_stand_beside_float32_and_never_beside_tf32(monkeypatch) -> None:
    names = dense_configs.candidates(90, 4, SHAPE[0])
    thirds = [name for name in names if CONFIGURATIONS[name].thirds]
    assert thirds
    assert not CONFIGURATIONS[names[0]].thirds  # what runs where nothing may be timed
    for name, allowed in ((thirds[0], "tf32x3"), (names[0], "ieee")):
        monkeypatch.setattr(dense_configs, "matmul_precision", lambda dtype: "ieee")
        assert dense_configs.precision(CONFIGURATIONS[name], torch.float32) == allowed
        monkeypatch.setattr(dense_configs, "matmul_precision", lambda dtype: "tf32")
        assert dense_configs.precision(CONFIGURATIONS[name], torch.float32) == "tf32"


@pytest.mark.parametrize(
    ("gibibytes", "mebibytes"), [(12, 256), (40, 640), (80, 1024), (141, 1024)]
)
def test_blocks_grow_with_the_memory_and_are_whole_tiles(
    gibibytes: int, mebibytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(total_memory=gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert launch.block_bytes(torch.device("cuda")) == mebibytes * 2**20
    assert launch.block_bytes(torch.device("cpu")) == 2**28
    monkeypatch.setattr(launch, "block_bytes", lambda device: mebibytes * 2**20)
    hidden, weight = (
        torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (65536, 33024)
    )
    call = launch.DenseCall(hidden, weight, None, torch.empty(65536, device="meta"), 1.0)
    for unit in (1, 16, 12):  # rows that one prompt has
        blocks = launch.row_blocks(call, unit, sums_weight=True)
        assert blocks.size % unit == blocks.size % launch.TILE_ROWS == 0
        assert blocks.size * 33024 * 2 <= mebibytes * 2**20
    assert launch.row_blocks(call, 5000, sums_weight=False).size % 5000 == 0


def test_memory_only(timed: list[list[str]], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(dense_configs.CACHE_FOLDER, "")
    choose()
    choose()
    assert len(timed) == 1
    assert not list(tmp_path.iterdir())
    dense_configs.forget()
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv(dense_configs.CACHE_FOLDER, str(blocked))
    with pytest.warns(UserWarning, match="in memory only"):
        choose()


@pytest.mark.parametrize(("allowed", "expected"), [(True, "tf32"), (False, "ieee")])
def test_tf32_only_where_torch_may(allowed: bool, expected: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        assert dense_configs.matmul_precision(torch.float32) == expected
    finally:
        torch.set_float32_matmul_precision(before)
