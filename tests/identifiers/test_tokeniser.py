"""A frozen tokeniser: new items get codes of the old ones' encoder and codebooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import Capture, call

from gflowgr.errors import DataError
from gflowgr.identifiers import (
    LetterConfig,
    Quantisation,
    RqVaeConfig,
    Tokeniser,
    fit_kmeans,
    fit_letter,
    fit_rqvae,
    raw_codes,
    read_index,
    resolve_collisions,
    tokeniser_path,
)
from gflowgr.identifiers.collisions import Collisions

RNG = np.random.default_rng(0)
VECTORS = (3 * RNG.normal(size=(60, 6)) + 5).astype(np.float32)
QUICK: dict[str, Any] = {"levels": 2, "codebook_size": 8, "code_width": 4, "hidden": (5,)}


def quantise(method: str) -> Quantisation:
    if method == "kmeans":
        return fit_kmeans(VECTORS, levels=2, codebook_size=8)
    if method == "rqvae":
        return fit_rqvae(VECTORS, RqVaeConfig(steps=5, **QUICK))
    cf = RNG.normal(size=(60, 3)).astype(np.float32)
    return fit_letter(VECTORS, cf, LetterConfig(steps=5, **QUICK))


@pytest.mark.parametrize("method", ["kmeans", "rqvae", "letter"])
def test_an_old_item_is_coded_as_it_was_also_after_a_file(method: str, tmp_path: Path) -> None:
    """Every method's encoder is kept whole: the codes as learned come back."""
    quantised = quantise(method)
    tokeniser = Tokeniser.of(quantised, "shared")
    if tokeniser.encoder is not None:
        np.testing.assert_allclose(
            tokeniser.encoder(VECTORS), quantised.vectors, rtol=1e-4, atol=1e-4
        )
    path = tmp_path / "tokeniser.x.safetensors"
    tokeniser.save(path)
    for each in (tokeniser, Tokeniser.load(path)):
        np.testing.assert_array_equal(each.extend(quantised.codes, VECTORS), quantised.codes)


def test_a_new_item_takes_the_nearest_identifier_that_is_free() -> None:
    """By hand: codebooks 0, 10 and 0, 1, 2; the code 2 of the second level is nobody's."""
    codebooks = np.array([[[0.0], [10.0], [20.0]], [[0.0], [1.0], [2.0]]], dtype=np.float32)
    old = np.array([[0, 0], [1, 1]])
    tokeniser = Tokeniser(codebooks, "reassign")
    new = np.array([[0.1], [2.0], [1.0], [19.0]], dtype=np.float32)
    # 0.1: (0, 0) is taken. 2.0: nothing is free under 0. 1.0: nor for it. 19: code 2 is unknown.
    np.testing.assert_array_equal(tokeniser.extend(old, new[:2]), [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="every identifier that the model has tokens for is taken"):
        tokeniser.extend(old, new[:3])
    shared = replace(tokeniser, collisions="shared")
    np.testing.assert_array_equal(shared.extend(old, new), [[0, 0], [0, 1], [0, 1], [1, 1]])


def test_the_extra_token_of_a_new_item_is_the_smallest_free_number() -> None:
    codebooks = np.array([[[0.0], [10.0]]], dtype=np.float32)
    old = np.array([[0, 0], [0, 1], [1, 0]])
    new = np.array([[9.0], [1.0]], dtype=np.float32)
    tokeniser = Tokeniser(codebooks, "extra")
    np.testing.assert_array_equal(tokeniser.extend(old, new[:1]), [[1, 1]])
    # Under 0 both numbers are taken, and so 1 is next; there is no number 2 in the model.
    np.testing.assert_array_equal(tokeniser.extend(old, new[1:]), [[1, 1]])
    with pytest.raises(ValueError, match="is taken"):
        tokeniser.extend(old, new)


@pytest.mark.parametrize("collisions", ["reassign", "extra"])
def test_identifiers_stay_unique(collisions: Collisions) -> None:
    quantised = quantise("kmeans")
    codes = resolve_collisions(quantised, collisions)
    new = Tokeniser.of(quantised, collisions).extend(codes, VECTORS[:3])
    whole = np.concatenate([codes, new])
    assert len(np.unique(whole, axis=0)) == 63
    for level in range(codes.shape[1]):
        assert set(new[:, level]) <= set(codes[:, level])


def test_bad_vectors_and_codes_are_refused() -> None:
    quantised = quantise("rqvae")
    tokeniser = Tokeniser.of(quantised, "reassign")
    with pytest.raises(ValueError, match=r"vectors must be \[new items, 6\].*got \[2, 5\]"):
        tokeniser.extend(quantised.codes, VECTORS[:2, :5])
    with pytest.raises(ValueError, match=r"codes must be \[items, 2\].*got \[60, 1\]"):
        tokeniser.extend(quantised.codes[:, :1], VECTORS)
    with pytest.raises(ValueError, match=r"vectors\[0\] is not finite"):
        tokeniser.extend(quantised.codes, np.full((1, 6), np.nan))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "tokeniser.x.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(DataError, match="not a safetensors file"):
        Tokeniser.load(path)
    good = {"format": "gflowgr.tokeniser", "collisions": "extra"}
    codebooks = np.zeros((1, 2, 3), np.float32)
    layer = {"weight0": np.zeros((3, 4), np.float32), "bias0": np.zeros(3, np.float32)}
    ends = {"mean": np.zeros(4, np.float32), "scale": np.ones(1, np.float32)}
    for arrays, metadata, message in (
        ({"codebooks": codebooks}, {"format": "another"}, "must be a tokeniser"),
        ({"codebooks": codebooks}, {**good, "collisions": "burn"}, "must be a tokeniser"),
        ({"codebooks": codebooks, "mean": ends["mean"]}, good, "must hold"),
        ({"codebooks": codebooks + np.inf}, good, "must hold finite numbers of float32"),
        ({"codebooks": codebooks[0]}, good, "the shapes do not fit together"),
        (
            {"codebooks": codebooks[..., :2], **layer, **ends},
            good,
            "the shapes do not fit together",
        ),
        (
            {"codebooks": codebooks, **layer, **ends, "mean": ends["mean"][:2]},
            good,
            "the shapes do not fit together",
        ),
    ):
        save_file({name: array.copy() for name, array in arrays.items()}, path, metadata=metadata)
        with pytest.raises(DataError, match=message):
            Tokeniser.load(path)


def test_the_command_extends_an_index(tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "old.npy", VECTORS)
    np.save(tmp_path / "new.npy", VECTORS[:2] + 0.1)
    index, more = tmp_path / "index.mine.json.gz", tmp_path / "index.more.json.gz"
    made = ("--method", "kmeans", "--levels", 3, "--codes", 8, "--output", index)
    assert call(capsys, "identifiers", "make", "--embeddings", tmp_path / "old.npy", *made)[0] == 0
    assert tokeniser_path(index).is_file()
    given = ("--embeddings", tmp_path / "new.npy", "--output", more)
    code, out, error = call(capsys, "identifiers", "extend", index, *given)
    assert (code, error) == (0, "")
    old, whole = read_index(index), read_index(more)
    assert whole.level_tokens == old.level_tokens  # the model's numbers of codes are the same
    np.testing.assert_array_equal(whole.codes[:60], old.codes)
    assert whole.num_unique() == 62
    assert f"  61  {whole.codes[61].tolist()}\n" in out
    np.testing.assert_array_equal(
        raw_codes(whole, more)[60:],
        Tokeniser.load(tokeniser_path(index)).extend(raw_codes(old, index), VECTORS[:2] + 0.1),
    )
    assert call(capsys, "identifiers", "extend", more, "--embeddings", tmp_path / "new.npy")[0] == 2
    code, _, error = call(capsys, "identifiers", "extend", index, "--output", tmp_path / "x")
    assert "must be named index.NAME.json.gz" in error
    nothing = ("--output", tmp_path / "index.x.json.gz")
    assert (
        "give --embeddings FILE.npy, or --data"
        in call(capsys, "identifiers", "extend", index, *nothing)[2]
    )
    tokeniser_path(index).unlink()
    code, _, error = call(capsys, "identifiers", "extend", index, *given, "--overwrite")
    assert (code, "tokeniser.mine.safetensors" in error) == (2, True)
