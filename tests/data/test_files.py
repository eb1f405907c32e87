"""Files are written whole or not at all, and damaged input is named."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gflowgr.errors import DataError, GFlowGRError, OutputError
from gflowgr.files import (
    atomic_path,
    ensure_writable,
    load_npy,
    max_json_bytes,
    read_json,
    save_npy,
    write_json,
    write_json_gz,
    write_text,
)
from gflowgr.folders import find_damage, fresh_folder, write_manifest


def refuse(code: int) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def test_errors_are_also_built_in_kinds() -> None:
    assert issubclass(DataError, ValueError)
    assert issubclass(DataError, GFlowGRError)
    assert issubclass(OutputError, OSError)


def test_json_round_trip_plain_and_gzipped(tmp_path: Path) -> None:
    content = {"title": "crème brûlée", "list": [1, 2.5, None]}
    write_json(tmp_path / "a.json", content)
    write_json_gz(tmp_path / "a.json.gz", content)
    assert read_json(tmp_path / "a.json") == content
    assert read_json(tmp_path / "a.json.gz", expect=dict) == content


def test_equal_content_gives_equal_gzip_bytes(tmp_path: Path) -> None:
    for name in ("one.json.gz", "two.json.gz"):
        write_json_gz(tmp_path / name, {"a": 1})
    assert (tmp_path / "one.json.gz").read_bytes() == (tmp_path / "two.json.gz").read_bytes()


def test_npy_round_trip(tmp_path: Path) -> None:
    save_npy(tmp_path / "deep" / "x.npy", np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "x.npy"), [[0, 1, 2], [3, 4, 5]])


def test_atomic_path_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "result.txt"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["result.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "result.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half of the new con")
            raise error

    with pytest.raises(error):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "quota"), (errno.EIO, "input/output")],
)
def test_a_full_disk_is_named_and_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(code))
    with pytest.raises(OutputError, match=words) as caught:
        write_json(tmp_path / "report.json", {"a": 1})
    assert caught.value.errno == code
    assert "report.json" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_in_the_middle_of_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.json.gz").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", refuse(errno.ENOSPC))
    with pytest.raises(OutputError, match="no space left"):
        write_json_gz(tmp_path / "data.json.gz", {"a": 1})
    assert os.listdir(tmp_path) == ["data.json.gz"]
    assert (tmp_path / "data.json.gz").read_bytes() == b"old"


def test_numpys_short_write_without_an_errno_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: Any, **kwargs: Any) -> None:
        raise OSError("1000 requested and 12 written")

    monkeypatch.setattr(np, "save", short)
    with pytest.raises(OutputError, match=r"x\.npy"):
        save_npy(tmp_path / "x.npy", np.zeros(1000))
    assert os.listdir(tmp_path) == []


def test_an_error_about_another_file_keeps_its_own_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "out.txt"):
        (tmp_path / "no such input").read_text()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    # Simulated, because the user who runs the tests may be allowed to write anywhere.
    monkeypatch.setattr(os, "open", refuse(code))
    with pytest.raises(OutputError, match=r"read-only|no permission") as caught:
        ensure_writable(tmp_path / "run")
    assert "run" in str(caught.value)
    with (
        pytest.raises(OutputError, match=r"read-only|no permission"),
        atomic_path(tmp_path / "run" / "model.bin"),
    ):
        pytest.fail("the body must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    with pytest.raises(OutputError, match="no permission"):
        ensure_writable(folder)


def test_too_little_space_is_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="bytes free") as caught:
        ensure_writable(tmp_path, min_free_bytes=1 << 62)
    assert caught.value.errno == errno.ENOSPC


def test_ensure_writable_creates_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    folder = ensure_writable(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert os.listdir(folder) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="run"):
        ensure_writable(tmp_path / "run")
    with pytest.raises(OutputError, match="cannot write"), atomic_path(tmp_path / "run" / "x"):
        pytest.fail("the body must not run")


def test_a_folder_where_the_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(OutputError, match="a folder has this name"):
        write_json(tmp_path / "x.json", {})


@pytest.mark.parametrize("keep", [5, 12, 200])
def test_truncated_gzip(tmp_path: Path, keep: int) -> None:
    whole = gzip.compress(json.dumps({str(i): [i] for i in range(200)}).encode())
    assert len(whole) > 200
    path = tmp_path / "inter.json.gz"
    path.write_bytes(whole[:keep])
    with pytest.raises(DataError, match=r"inter\.json\.gz: the gzip file is truncated"):
        read_json(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(json.dumps({str(i): [i] for i in range(200)}).encode()))
    whole[60] ^= 0xFF
    path = tmp_path / "inter.json.gz"
    path.write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"inter\.json\.gz: the gzip file is (damaged|truncated)"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"0": [1 2]}', "line 1 column 10"),
        (b'{"0": [1],\n "1": [2', "line 2 column"),
        (b"", "not valid JSON, line 1 column 1"),
        (b'{"0": [1], "0": [2]}', "the key '0' occurs twice"),
        (b'{"0": "\xff"}', "not UTF-8 text, byte 7"),
        (b"[1, 2]", "must be an object .* got list"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_wrong_json_is_located(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "inter.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"inter\.json: .*{message}"):
        read_json(path, expect=dict)


def test_a_gz_name_on_plain_text(tmp_path: Path) -> None:
    (tmp_path / "inter.json.gz").write_text("{}")
    with pytest.raises(DataError, match="not a gzip file"):
        read_json(tmp_path / "inter.json.gz")


# ---- what survives a loss of power ----


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is flushed to the disk and renamed, in order."""
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        done.append("flush " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    def noted_replace(source: Any, target: Any) -> None:
        replace(source, target)
        done.append(f"rename to {Path(target).name}")

    def noted_rename(self: Path, target: Any) -> Path:
        done.append(f"rename to {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(Path, "rename", noted_rename)
    return done


def test_a_file_is_flushed_before_its_rename_and_its_folder_after_it(
    tmp_path: Path, flushed: list[str]
) -> None:
    write_json(tmp_path / "run" / "a.json", {})
    temporary, renamed, folder = flushed
    assert temporary.startswith("flush .a.")
    assert (renamed, folder) == ("rename to a.json", "flush run")


def test_a_manifest_is_written_when_all_else_is_on_the_disk(
    tmp_path: Path, flushed: list[str]
) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a.bin", "inner/b.bin"):
        (tmp_path / name).write_bytes(b"x")
    write_manifest(tmp_path)
    assert sorted(flushed[:2]) == ["flush a.bin", "flush b.bin"]
    assert flushed[2:4] == [f"flush {tmp_path.name}", "flush inner"]
    assert flushed[4].startswith("flush .manifest.")
    assert flushed[5:] == ["rename to manifest.json", f"flush {tmp_path.name}"]
    assert find_damage(tmp_path) is None


def test_a_folder_is_swapped_in_whole_and_its_parent_flushed(
    tmp_path: Path, flushed: list[str]
) -> None:
    with fresh_folder(tmp_path / "model", is_own=lambda name: True) as fresh:
        (fresh / "a.bin").write_bytes(b"x")
    assert flushed[-2:] == ["rename to model", f"flush {tmp_path.name}"]
    assert sorted(os.listdir(tmp_path)) == ["model"]


@pytest.mark.parametrize("foreign", [False, True], ids=["swapped", "beside other files"])
def test_an_interrupted_save_leaves_the_folder_as_it_was(foreign: bool, tmp_path: Path) -> None:
    def save(content: bytes, interrupted: bool = False) -> None:
        with fresh_folder(tmp_path / "model", is_own=lambda name: name == "a.bin") as fresh:
            (fresh / "a.bin").write_bytes(content)
            if interrupted:
                raise KeyboardInterrupt

    save(b"old")
    if foreign:
        (tmp_path / "model" / "README.md").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        save(b"new", interrupted=True)
    assert (tmp_path / "model" / "a.bin").read_bytes() == b"old"
    assert find_damage(tmp_path / "model") is None
    save(b"new")
    assert (tmp_path / "model" / "a.bin").read_bytes() == b"new"
    assert find_damage(tmp_path / "model") is None
    wanted = ["README.md"] * foreign + ["a.bin", "manifest.json"]
    assert sorted(os.listdir(tmp_path / "model")) == wanted
    assert os.listdir(tmp_path) == ["model"]


# ---- hostile files ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": %s}' % ("9" * 5000), "a number has too many digits"),
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        (r'{"a": [{"title": "\ud800 x"}]}', r"a lone surrogate, '\\ud800 x' at 'a'/0/'title'"),
        (r'{"\uDFFF": 1}', r"a lone surrogate, '\\udfff' at '\\udfff'"),
        ('{"k": 1, "k": 2}'.replace("k", "k" * 5000), r"the key 'kk.*k' occurs twice"),
    ],
)
def test_json_that_would_fail_later_is_refused_in_a_line(
    text: str, message: str, tmp_path: Path
) -> None:
    for name, raw in (("a.json", text.encode()), ("a.json.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=message) as caught:
            read_json(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_escaped_pairs_and_escaped_backslashes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(r'["\ud83d\ude00", "\\ud800"]')
    assert read_json(tmp_path / "a.json") == ["\N{GRINNING FACE}", r"\ud800"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_no_more_than_the_stated_bytes_are_unpacked(
    pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert max_json_bytes() == 2**30
    monkeypatch.setenv("GFLOWGR_MAX_JSON_BYTES", "3000000")
    text = b"[" + b" " * 2_999_998 + b"]"
    (tmp_path / "a.json").write_bytes(pack(text))
    assert read_json(tmp_path / "a.json") == []
    (tmp_path / "a.json").write_bytes(pack(text + b" "))
    with pytest.raises(DataError, match=r"a\.json must be at most 3,000,000 bytes"):
        read_json(tmp_path / "a.json")
    monkeypatch.setenv("GFLOWGR_MAX_JSON_BYTES", "1e9")
    with pytest.raises(ValueError, match="GFLOWGR_MAX_JSON_BYTES must be a number of bytes; got"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("read", [read_json, load_npy])
def test_pipes_folders_and_devices_are_refused_and_not_waited_for(
    read: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, kind in (
        (tmp_path / "pipe", "pipe"),
        (tmp_path / "folder", "folder"),
        (Path("/dev/zero"), "device"),
    ):
        with pytest.raises(DataError, match=f"{path} must be a regular file; got a {kind}"):
            read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")
    with pytest.raises(DataError, match="must be the name of a file"):
        read(tmp_path / "nul\0")


def _npy_header(shape: str) -> bytes:
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"{}",
        _npy_header("(1000000000000,)"),
        _npy_header("(9223372036854775807, 9223372036854775807)"),
        _npy_header("(-1,)"),
        _npy_header("(" * 3000 + ")" * 3000),
        _npy_header("(1"),
    ],
)
@pytest.mark.parametrize("mmap", [False, True])
def test_an_array_that_is_none_is_named(content: bytes, mmap: bool, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npy: not a readable \.npy file of numbers"):
        load_npy(tmp_path / "a.npy", mmap=mmap)


def test_arrays_of_objects_and_archives_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a readable"):
        load_npy(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="an archive"):
        load_npy(tmp_path / "a.npz")


def test_a_report_is_written_whatever_texts_it_quotes(tmp_path: Path) -> None:
    write_text(tmp_path / "report.md", "command: train caf\udce9")
    assert (tmp_path / "report.md").read_text() == r"command: train caf\udce9"
