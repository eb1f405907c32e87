"""The report of a run: its texts, tables, plots and pages."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.tiny_split import tiny_split

from gflowgr.collaborative import Popularity
from gflowgr.data import LeaveOneOut
from gflowgr.errors import OutputError
from gflowgr.evaluation import ScoringRecommender, evaluate
from gflowgr.report import plots
from gflowgr.report.tables import TableRow
from gflowgr.runs.example_lists import example_recommendations
from gflowgr.runs.run_report import Report, write_report

ROWS = [
    TableRow("SFT", {"R@5": 0.0413, "N@10": 0.0343, "entropy": 7.2, "num_users": 10.0}),
    TableRow("GFlowGR-TB", {"R@5": 0.0433, "N@10": 0.0363, "num_users": 10.0}, {"R@5": 0.0011}),
]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def split() -> LeaveOneOut:
    """Four evaluated users, eight items."""
    return tiny_split()


def logs(flow: bool) -> list[dict[str, float]]:
    """A log history as the Trainer leaves it."""
    entries: list[dict[str, float]] = []
    for step in range(10, 410, 10):
        entry = {"step": step, "epoch": step / 100, "loss": 9.0, "loss_gr": 5 - step / 200}
        if flow:
            entry |= {"loss_gfn": 400 / step, "log_z": step / 100, "log_z_group": step / 90}
            entry |= {f"reward/r_{part}": 1.0 for part in ("a", "yhat", "sim")}
            entry |= {f"difficulty/q{q}": q / 100 for q in (10, 50, 90)}
        entries += [entry, {"step": step, "eval_N@10": step / 1e4}] if step % 100 == 0 else [entry]
    return [*entries, {"train_runtime": 1.0, "step": 400}]


def test_report_holds_everything(split: LeaveOneOut, tmp_path: Path) -> None:
    popularity = ScoringRecommender("popularity", Popularity(split.item_counts))
    result = evaluate(popularity, split, "test", ks=(1, 2), progress=False)
    report = Report(
        title="Tiny run",
        rows=[*ROWS, TableRow.of(result)],
        rules=result.rules,
        setup={"data": "tiny", "learning rate": 0.0005, "command": "gflowgr train --a_b"},
        stages={"SFT": logs(flow=False), "GFlowGR-TB": logs(flow=True)},
        examples=example_recommendations(split, {"popularity": result}, count=3),
        caveats=["One seed only."],
        references=[TableRow("SASRec", {"R@5": 0.0387}, note="published")],
    )
    path = write_report(tmp_path, report)
    text = path.read_text()
    for row in ROWS:
        assert f"| {row.name} |" in text
    for rule in result.rules.values():
        assert rule in text
    for expected in ("One seed only.", "published", "0.0005", "--a_b", "Held-out item", "torch"):
        assert expected in text
    assert text.count("✓ |") == 1  # everybody gets items 0 and 4; 0 is one user's target
    # Titles keep their characters: none of them may break the table or turn bold.
    assert "Item \\*" in text
    assert "\\| blue" in text
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(shown) == 6
    assert sorted(shown) == sorted(p.name for p in tmp_path.glob("*.png"))
    for name in shown:
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert not list(tmp_path.glob("*.tmp*"))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert page.count("<table>") == text.count("| ---") - text.count(" | ---") == 7


def test_report_leaves_out_plots_without_data(tmp_path: Path) -> None:
    (tmp_path / "log_z.png").write_bytes(b"of an earlier report")
    text = write_report(tmp_path, Report("SFT only", ROWS, {}, stages={"SFT": logs(False)}))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "losses.png",
        "metrics.png",
        "report.html",
        "report.md",
        "validation.png",
    ]
    assert "log Z" not in text.read_text()


def test_the_validation_plot_says_the_best_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, Figure] = {}

    def save(figure: Figure, path: Path) -> bool:
        saved[path.name] = figure
        path.write_bytes(PNG)
        return True

    monkeypatch.setattr(plots, "save", save)
    stages = {"SFT": logs(False), "GFlowGR-TB": [{"step": 1, "eval_N@10": 0.07}]}
    write_report(tmp_path, Report("R", ROWS, {}, stages=stages))
    (legend,) = saved["validation.png"].legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["SFT (best 0.0400)", "GFlowGR-TB (best 0.0700)"]


def test_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_report(tmp_path / name, Report("R", ROWS, {}, stages={"SFT": logs(True)}))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_report_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken"):
        write_report(tmp_path / "taken", Report("R", ROWS, {}))


def test_examples_show_titles_of_both_kinds_of_users(split: LeaveOneOut) -> None:
    # Everybody gets items 0 and 7: found for users u1 and u2, missed for u0 and u4.
    counts = np.array([9, 0, 0, 0, 0, 0, 0, 8])
    result = evaluate(
        ScoringRecommender("p", Popularity(counts)), split, "test", ks=(2,), progress=False
    )
    examples = example_recommendations(split, {"p": result}, count=3, history=1)
    assert {example.user for example in examples[:2]} == {"u1", "u2"}
    assert examples[2].user in {"u0", "u4"}
    for example in examples:
        assert example.recommendations == {"p": ["Item *0* | blue", "Item *7* | blue"]}
        assert len(example.history) == 1
    by_user = {example.user: example for example in examples}
    assert by_user["u1"].target == "Item *0* | blue"
    assert by_user["u1"].found == {"p": 0}
    assert by_user["u2"].found == {"p": 1}
    assert examples[2].found == {"p": -1}
    assert by_user["u1"].history == ["Item *6* | blue"]
    assert len(example_recommendations(split, {"p": result}, count=99)) == 4
    other = evaluate(ScoringRecommender("p", Popularity(counts)), split, "valid", progress=False)
    with pytest.raises(ValueError, match="evaluation 'q' is of another part or other users"):
        example_recommendations(split, {"p": result, "q": other})
