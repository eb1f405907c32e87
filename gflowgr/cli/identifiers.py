"""``gflowgr identifiers``: identifiers of items are made, extended, checked and compared."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extensions import is_outside
from ._parsers import Commands, command

if TYPE_CHECKING:
    import numpy as np

    from ..data import Dataset
    from ..identifiers import Identifiers, Quality

__all__ = ["add_identifiers"]

_MAKE = """\
examples:
  gflowgr identifiers make --data FOLDER --fields title categories \\
      --output FOLDER/index.rqvae.json.gz
  gflowgr identifiers make --data FOLDER --method letter --cf-embeddings cf.npy \\
      --output FOLDER/index.letter.json.gz
  gflowgr identifiers make --embeddings items.npy --method kmeans --levels 3 \\
      --collisions extra --output index.kmeans.json.gz

Item vectors are TF-IDF of words and word pairs, reduced by SVD; --encoder names a pretrained
one instead, --embeddings a file. Nothing is downloaded unless --allow-download is given.

A function of yours, --method module:function, is called with the dataset, the vectors of
--embeddings or --cf-embeddings (or None) and the seed, and gives integer codes [items, L],
padded with -1; its module may be in the current folder. It has no tokeniser for new items."""

_COMPARE = """\
example:
  gflowgr identifiers compare letter_official rqvae --data FOLDER \\
      --cf-embeddings cf.npy --out report

INDEX is a file, or the NAME of index.NAME.json.gz in the dataset's folder. Where there are texts
or --embeddings, and --cf-embeddings, the agreement with these spaces is measured."""

_EXTEND = """\
examples:
  gflowgr identifiers extend FOLDER/index.mine.json.gz --embeddings new.npy \\
      --output FOLDER/index.more.json.gz
  gflowgr identifiers extend FOLDER/index.mine.json.gz --data MORE --encoder ENCODER \\
      --output MORE/index.mine.json.gz

INDEX must have been made by gflowgr identifiers make, which keeps the tokeniser beside it
(tokeniser.NAME.safetensors). --embeddings has a row for each new item; of --data the items past
the last one of INDEX are new. TF-IDF vectors are of one set of texts: they cannot be made for
new items, so texts need --encoder. New items are numbered on; no old one gets another identifier,
and only codes are used that the old ones use, so a trained model knows them all."""

# As in `gflowgr.identifiers`, which is imported only when the command runs.
METHODS = ("rqvae", "kmeans", "letter")
COLLISIONS = ("reassign", "extra", "shared")
_TRAINING = ("steps", "hidden", "balanced", "device", "alignment", "diversity")


def add_identifiers(commands: Commands) -> None:
    """Declare ``gflowgr identifiers``."""
    parser = command(
        commands, "identifiers", "make, extend, check and compare identifiers of items"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_make(actions)
    _add_extend(actions)
    check = command(actions, "check", "check an index file, and measure its identifiers", _COMPARE)
    check.add_argument("index", nargs=1, metavar="INDEX", help="an index file, or its name")
    compare = command(actions, "compare", "measure several index files side by side", _COMPARE)
    compare.add_argument("index", nargs="+", metavar="INDEX", help="index files, or their names")
    for measured in (check, compare):
        _add_vectors(measured)
        measured.add_argument(
            "--neighbours",
            type=int,
            default=10,
            metavar="K",
            help="neighbours for the agreement (default: %(default)s)",
        )
        measured.add_argument("--out", metavar="FOLDER", help="write JSON, Markdown, plots there")
        measured.set_defaults(run=_compare)


def _add_make(actions: Commands) -> None:
    parser = command(actions, "make", "learn identifiers from texts or item vectors", _MAKE)
    parser.add_argument("--output", required=True, metavar="FILE", help="index.NAME.json.gz")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument(
        "--method",
        type=_method,
        default="rqvae",
        metavar="METHOD",
        help=f"{', '.join(METHODS)}, or a function of yours as module:function (default: rqvae)",
    )
    parser.add_argument("--levels", type=int, default=4, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--codes", type=int, default=256, help="codes per level (default: %(default)s)"
    )
    parser.add_argument(
        "--collisions",
        choices=COLLISIONS,
        default="reassign",
        help="items with the same codes move to free last codes, get an extra token, or share "
        "their identifier (default: %(default)s)",
    )
    _add_vectors(parser)
    parser.add_argument("--save-embeddings", metavar="FILE.npy", help="keep the vectors of texts")
    training = parser.add_argument_group("training of rqvae and letter")
    training.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    training.add_argument("--hidden", type=int, nargs="+", metavar="N", help="hidden layers")
    training.add_argument(
        "--balanced", choices=("none", "last", "all"), help="levels with Sinkhorn assignment"
    )
    training.add_argument("--device", help="such as cuda")
    training.add_argument("--alignment", type=float, metavar="ALPHA", help="letter: its weight")
    training.add_argument("--diversity", type=float, metavar="BETA", help="letter: its weight")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.set_defaults(run=_make)


def _method(name: str) -> str:
    if name not in METHODS and not is_outside(name):
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(METHODS)}, or 'module:function'; got {name!r}"
        )
    return name


def _add_extend(actions: Commands) -> None:
    parser = command(actions, "extend", "code new items with a frozen tokeniser", _EXTEND)
    parser.add_argument("index", metavar="INDEX", help="index.NAME.json.gz of the old items")
    parser.add_argument("--output", required=True, metavar="FILE", help="index.NAME.json.gz")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument("--data", metavar="FOLDER", help="a dataset with the new items' texts")
    parser.add_argument(
        "--fields", nargs="+", metavar="NAME", help="fields of the items' texts (default: all)"
    )
    parser.add_argument("--embeddings", metavar="FILE.npy", help="vectors of the new items")
    parser.add_argument("--encoder", metavar="NAME", help="text encoder: a folder or hub model")
    parser.add_argument(
        "--allow-download", action="store_true", help="fetch a hub model that is not there"
    )
    parser.set_defaults(run=_extend)


def _add_vectors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FOLDER", help="the dataset")
    parser.add_argument(
        "--fields", nargs="+", metavar="NAME", help="fields of the items' texts (default: all)"
    )
    parser.add_argument("--embeddings", metavar="FILE.npy", help="item vectors, not texts")
    parser.add_argument("--encoder", metavar="NAME", help="text encoder: a folder or hub model")
    parser.add_argument(
        "--allow-download", action="store_true", help="fetch a hub model that is not there"
    )
    parser.add_argument(
        "--dim", type=int, default=512, help="width of TF-IDF vectors (default: %(default)s)"
    )
    parser.add_argument("--cf-embeddings", metavar="FILE.npy", help="collaborative item vectors")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")


# ---- what runs ----


def _make(args: argparse.Namespace) -> int:
    from .. import files
    from ..identifiers import (
        Tokeniser,
        from_codes,
        learn_codes,
        resolve_collisions,
        tokeniser_path,
        write_index,
    )

    output = _output(args)
    if is_outside(args.method):
        return _make_own(args, output)
    if args.data is None and args.embeddings is None:
        raise ValueError("give --data FOLDER (item texts) or --embeddings FILE.npy")
    if args.save_embeddings and args.embeddings:
        raise ValueError("--save-embeddings keeps vectors of texts, --embeddings has them already")
    files.ensure_writable(output.parent)  # before the training, not after it
    dataset = _dataset(args)
    vectors = _item_vectors(args, dataset)
    assert vectors is not None  # there are texts or a file, or an error has said so
    if args.save_embeddings:
        files.save_npy(args.save_embeddings, vectors)
    collaborative = _load_vectors(args.cf_embeddings, "--cf-embeddings", len(vectors))
    if args.method == "letter" and collaborative is None:
        raise ValueError("--method letter needs --cf-embeddings FILE.npy")
    training: dict[str, Any] = {
        name: getattr(args, name) for name in _TRAINING if getattr(args, name) is not None
    }
    if "hidden" in training:
        training["hidden"] = tuple(training["hidden"])
    start = time.perf_counter()
    quantised = learn_codes(
        args.method,
        vectors,
        collaborative if args.method == "letter" else None,
        levels=args.levels,
        codebook_size=args.codes,
        seed=args.seed,
        progress=not args.no_progress,
        **training,
    )
    resolved = resolve_collisions(quantised, args.collisions)
    Tokeniser.of(quantised, args.collisions).save(tokeniser_path(output))
    write_index(output, resolved)
    seconds = time.perf_counter() - start
    print(f"{args.method}: {len(vectors):,} items coded in {seconds:.0f} s")
    shown = {"codes as learned": quantised.codes, f"collisions: {args.collisions}": resolved}
    _print_table(
        {name: from_codes(codes) for name, codes in shown.items()},
        {"text" if args.embeddings is None else "embeddings": vectors, "cf": collaborative},
    )
    print(f"\nwritten to {output}")
    return 0


def _make_own(args: argparse.Namespace, output: Path) -> int:
    """By a function of the user's."""
    from .. import files
    from ..identifiers import outside_identifiers, tokeniser_path, write_index

    unused = [name for name in _TRAINING if getattr(args, name) is not None]
    if unused:
        raise ValueError(f"--method {args.method} has no option {', '.join(unused)}")
    dataset = _dataset(args)
    if dataset is None:
        raise ValueError(f"--method {args.method} needs --data FOLDER")
    files.ensure_writable(output.parent)
    vectors = {
        space: _load_vectors(getattr(args, name), f"--{name.replace('_', '-')}", dataset.num_items)
        for space, name in (("embeddings", "embeddings"), ("cf", "cf_embeddings"))
    }
    given = next((each for each in vectors.values() if each is not None), None)
    made = outside_identifiers(args.method, dataset, given, args.seed, setting="--method")
    write_index(output, made)
    tokeniser_path(output).unlink(missing_ok=True)  # of another index that had this name
    _print_table({args.method: made}, vectors)
    print(f"\nwritten to {output}")
    return 0


def _extend(args: argparse.Namespace) -> int:
    import numpy as np

    from .. import files
    from ..identifiers import (
        Tokeniser,
        from_codes,
        raw_codes,
        read_index,
        tokeniser_path,
        write_index,
    )

    output = _output(args)
    if args.embeddings is None and (args.data is None or args.encoder is None):
        raise ValueError("give --embeddings FILE.npy, or --data FOLDER and --encoder NAME")
    tokeniser = Tokeniser.load(tokeniser_path(args.index))
    codes = raw_codes(read_index(args.index), args.index)
    if args.embeddings is None:
        vectors = _item_vectors(args, _dataset(args))
        assert vectors is not None
        if len(vectors) <= len(codes):
            raise ValueError(
                f"--data {args.data} must have more than the {len(codes):,} items of {args.index}; "
                f"got {len(vectors):,}"
            )
        vectors = vectors[len(codes) :]
    else:
        vectors = _load_vectors(args.embeddings, "--embeddings", None)
        assert vectors is not None
    files.ensure_writable(output.parent)
    new = tokeniser.extend(codes, vectors)
    whole = np.concatenate([codes, new])
    tokeniser.save(tokeniser_path(output))
    write_index(output, whole)
    print(
        f"{len(new):,} new items, after {len(codes):,}; their codes as a trained model counts them:"
    )
    for item, row in enumerate(from_codes(whole).codes[len(codes) :].tolist(), len(codes)):
        print(f"  {item}  {row}")
    print(f"written to {output}")
    return 0


def _output(args: argparse.Namespace) -> Path:
    output = Path(args.output)
    if not re.fullmatch(r"index\.[^/]+\.json\.gz", output.name):
        raise ValueError(f"--output {output} must be named index.NAME.json.gz")
    if output.exists() and not args.overwrite:
        raise ValueError(f"--output {output} exists; give --overwrite to replace it")
    return output


def _compare(args: argparse.Namespace) -> int:
    from .. import files
    from ..identifiers import quality_table, read_index
    from ..identifiers.plots import plot_agreement, plot_code_use

    if args.out:
        files.ensure_writable(args.out)
    dataset = _dataset(args)
    sets: dict[str, Identifiers] = {}
    for given in args.index:
        path = Path(given)
        if not path.is_file():
            if dataset is None:
                raise ValueError(f"INDEX {given}: there is no such file, and no --data to find it")
            path = dataset.index_path(given)
        name = path.name.removeprefix("index.").removesuffix(".gz").removesuffix(".json")
        if name in sets:
            raise ValueError(f"INDEX {given}: there is another one named {name!r}")
        count = (
            dataset.num_items if dataset else next(iter(sets.values())).num_items if sets else None
        )
        sets[name] = read_index(path, num_items=count)
    items = next(iter(sets.values())).num_items
    vectors = _item_vectors(args, dataset)
    if vectors is not None and len(vectors) != items:
        raise ValueError(f"--embeddings has {len(vectors):,} rows, there are {items:,} items")
    spaces = {
        "text" if args.embeddings is None else "embeddings": vectors,
        "cf": _load_vectors(args.cf_embeddings, "--cf-embeddings", items),
    }
    rows, note = _print_table(sets, spaces, args.neighbours)
    if args.out:
        out = Path(args.out)
        files.write_json(
            out / "identifiers.json", {name: row.to_json() for name, row in rows.items()}
        )
        table = quality_table(rows, style="markdown")
        files.write_text(out / "identifiers.md", f"{table}\n\n{note}\n")
        plot_code_use(rows, out / "code_use.png")
        plot_agreement(rows, out / "agreement.png")
        print(f"\nwritten to {out}")
    return 0


def _print_table(
    sets: dict[str, Identifiers], spaces: dict[str, np.ndarray | None], k: int = 10
) -> tuple[dict[str, Quality], str]:
    """The measures, and the note that explains the table."""
    from ..identifiers import measure_quality, nearest_neighbours, quality_table
    from ..identifiers.quality import table_note

    neighbours = {
        space: nearest_neighbours(vectors, k)
        for space, vectors in spaces.items()
        if vectors is not None
    }
    rows = {name: measure_quality(each, neighbours) for name, each in sets.items()}
    note = table_note(k if neighbours else None)
    print(f"{quality_table(rows)}\n\n{note}")
    return rows, note


def _dataset(args: argparse.Namespace) -> Dataset | None:
    from ..data import load_dataset

    return load_dataset(args.data) if args.data is not None else None


def _item_vectors(args: argparse.Namespace, dataset: Dataset | None) -> np.ndarray | None:
    """Vectors of ``--embeddings``, else of the dataset's texts; None without either."""
    from ..identifiers import encode_texts, item_texts, text_embeddings
    from ..runs.processes import quiet_transformers

    if args.embeddings is not None:
        for option in ("fields", "encoder"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option} is about texts; leave it out, or --embeddings")
        count = dataset.num_items if dataset else None
        return _load_vectors(args.embeddings, "--embeddings", count)
    if dataset is None:
        return None
    if dataset.texts is None:
        if args.action == "make":
            raise ValueError(f"{args.data} has no item texts (item.json.gz); give --embeddings")
        return None
    texts = item_texts(dataset.texts, args.fields)
    if args.encoder is None:
        return text_embeddings(texts, dim=args.dim, seed=args.seed)
    if args.allow_download:
        os.environ["HF_HUB_OFFLINE"] = "0"  # the command line sets it; read on first import
    quiet_transformers()
    return encode_texts(
        texts,
        args.encoder,
        allow_download=args.allow_download,
        progress=not getattr(args, "no_progress", True),
    )


def _load_vectors(path: str | None, option: str, num_items: int | None) -> np.ndarray | None:
    from ..errors import DataError
    from ..files import load_npy
    from ..identifiers.quantisation import checked_vectors

    if path is None:
        return None
    try:
        vectors = load_npy(path)
    except DataError as error:
        raise DataError(f"{option} {error}") from error
    return checked_vectors(vectors, f"{option} {path}", num_items)
