"""The written report: its numbers, its page, and what it says of an incomplete experiment."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import runpy
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.experiment_folder import BASELINE, FULL, METHODS, method, write_experiment

from gflowgr.cli import main
from gflowgr.runs.processes import alone
from gflowgr.runs.report import write_report
from gflowgr.runs.results import read_results
from gflowgr.runs.summary import Setting, summarise, verdict

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "generate_results.py"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects texts, anchors and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids.update(value for key, value in attrs if key == "id" and value)
        if tag == "a":
            self.links.append(values["href"] or "")
        if tag == "img":
            self.images.append(values)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# The report of `out` has its pictures; the tests of other reports are about texts.
pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What ``write_report`` gave: the page, and the text for the screen."""
    return write_report(write_experiment(tmp_path_factory.mktemp("experiment")))


@pytest.fixture(scope="module")
def out(written: tuple[Path, str]) -> Path:
    folder = written[0].parent
    assert written[0] == folder / "report.md"
    return folder


def test_tables_have_the_means_spread_and_differences(out: Path) -> None:
    results = read_results(out)
    facts = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in facts["settings"][0]["rows"]}
    cells = results.seeds_of("Shop", "tiger", FULL)
    values = [cell.metrics["R@10"] for cell in cells.values()]
    mean, sd = statistics.mean(values), statistics.stdev(values)
    assert rows[FULL]["metrics"]["R@10"]["mean"] == pytest.approx(mean)
    text = (out / "report.md").read_text()
    assert re.search(rf"\| {FULL} \|.*\*\*{mean:.4f} ± {sd:.4f}\*\*", text)
    difference = rows[FULL]["to_baseline"]["metrics"]["R@10"]
    base = results.seeds_of("Shop", "tiger", BASELINE)
    other = statistics.mean(cell.metrics["R@10"] for cell in base.values())
    assert difference["mean"] == pytest.approx(mean - other)
    assert f"**{mean - other:+.4f} ({difference['low']:+.4f}, {difference['high']:+.4f})" in text
    assert rows[f"{FULL} without r_a"]["to_full"]["metrics"]["R@10"]["mean"] < 0
    assert rows[FULL]["relative"]["seconds_per_step"] == pytest.approx(1.5)
    assert f"{FULL} without r_a" in text
    assert "0.1 (own)" in text
    assert rows[FULL]["to_teacher"]["against"] == "SASRec"
    assert "Differences to SASRec" in text
    assert "Test users, seen items masked" in text
    assert "Test users, generators together with SASRec" in text
    # 12 CPU seconds of its own, 9 before; the report's first figure is over that time.
    assert rows[FULL]["training"]["cpu_seconds_in_all"]["mean"] == pytest.approx(21)
    assert re.search(rf"{FULL} 0\.204\d within 21 CPU seconds", text)
    # Half of the sum of |0.5 - 0.395| and |0.2 - 0.305|.
    assert re.search(rf"mean total variation: SFT 0\.065.*{FULL} 0\.105", text)
    assert text.index("Validation over CPU time") < text.index("### Results")
    assert (
        text.count("**Seen items**: not masked") >= 6
    )  # the rules that matter most, under each table


def test_nothing_of_the_machine_but_its_kind_is_passed_on(out: Path) -> None:
    for name in ("results.json", "report.md", "report.html"):
        assert "/secret" not in (out / name).read_text()
    assert json.loads((out / "results.json").read_text())["base"]["data"]["path"] == "Shop"


def test_lines_hold_every_number_once(out: Path) -> None:
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    wanted = {"seed": "43", "method": FULL, "kind": "metric", "quantity": "N@10"}
    (line,) = (each for each in lines if wanted.items() <= each.items())
    cell = read_results(out).seeds_of("Shop", "tiger", FULL)[43]
    assert float(line["number"]) == cell.metrics["N@10"]
    kinds = {each["kind"].split(",")[0] for each in lines}
    expected = {"metric", "training", "diversity", "calibration", "breakdown"}
    against = {f"difference to {name}" for name in (BASELINE, FULL, "SASRec")}
    assert kinds == expected | against | {"metric"}
    for kind in ("metric, seen items masked", "metric, with the collaborative model"):
        also = [each for each in lines if each["kind"] == kind]
        assert len(also) == 3 * 7 * (1 + len(METHODS))  # seeds, metrics, the start and the methods


def test_the_page_is_sound_and_needs_nothing_else(out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert page.links
    assert not page.tags & {"script", "link", "iframe"}
    assert "http" not in text
    assert "url(" not in text
    assert len(page.images) == len(list((out / "figures").iterdir())) >= 9
    for image in page.images:
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert len(image["alt"] or "") > 20
    assert "A made-up <experiment>" in page.texts
    assert (
        text.count('<div class="wide"') == text.count("<table>") == text.count("</table>\n</div>")
    )
    markdown = (out / "report.md").read_text()
    for file in re.findall(r"\]\((.*?\.png)\)", markdown):
        assert (out / file).is_file()
    # The same numbers in both.
    numbers = re.findall(r"\d\.\d{4} ± \d\.\d{4}", markdown)
    shown = " ".join(page.texts)
    assert numbers
    assert all(number in shown for number in numbers)


def test_an_incomplete_experiment_says_what_is_missing(tmp_path: Path) -> None:
    out = write_experiment(tmp_path / "out", seeds=(42, 43))
    for cell in ("seed_42/tiger/gflowgr-tb", "seed_42/tiger/sft_continued"):
        (out / "Shop" / cell / "evaluation" / "analysis.json").unlink()
    (out / "Shop/seed_43/tiger/sft_continued/evaluation/analysis.json").unlink()
    path, screen = write_report(out)
    text = path.read_text()
    assert "## What is missing" in text
    assert f"{BASELINE}; {FULL} (seed 42)" in text
    assert f"{FULL} (1 of 2 seeds)" in text
    assert "missing" in screen


def test_nothing_but_the_description(tmp_path: Path) -> None:
    out = write_experiment(tmp_path / "out", seeds=(42,))
    for path in out.rglob("analysis.json"):
        path.unlink()
    assert f"{FULL}; {FULL} without r_a" in write_report(out)[0].read_text()


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    methods = [each for each in METHODS if each["group"] == "main"]
    out = write_experiment(tmp_path / "out", seeds=(42,), methods=methods)
    text = write_report(out)[0].read_text()
    assert "One seed: nothing is known" in text
    assert not re.search(r"\d ± ", text)
    assert "### Ablations" not in text
    assert "## Grids" not in text


def test_one_seed_of_several_is_said(tmp_path: Path) -> None:
    out = write_experiment(tmp_path / "out", seeds=(42, 43))
    for path in (out / "Shop" / "seed_43").rglob("analysis.json"):
        path.unlink()
    text = write_report(out)[0].read_text()
    assert "One seed: 42 (of 42, 43)." in text
    assert "One seed: nothing is known" in text


def test_callers_that_end_together_write_one_after_the_other(tmp_path: Path) -> None:
    out = write_experiment(tmp_path / "out", seeds=(42,))
    with ThreadPoolExecutor(1) as pool:
        with alone(out):
            other = pool.submit(write_report, out)
            assert not wait([other], timeout=1).done
            assert not (out / "report.md").exists()
        assert other.result(timeout=60)[0].is_file()


def test_the_screen_has_the_main_table_and_a_sentence(written: tuple[Path, str]) -> None:
    text = written[1]
    assert "Shop, tiger identifiers" in text
    assert f"above {BASELINE} on all metrics: {FULL}" in text
    assert "without r_a" not in text


def test_the_verdict_follows_its_rule() -> None:
    up, down, none = (0.1, 0.01), (-0.1, 0.01), (0.1, 0.06)
    differences = {
        "A": {"R": up, "N": up},
        "B": {"R": up, "N": none},
        "C": {"R": up, "N": down},
        "D": {"R": none, "N": none},
        "E": {"R": down, "N": down},
    }
    assert verdict(differences, "X") == (
        "With p < 0.05 by Holm's correction, above X on all metrics: A; "
        "above X on some metrics: B (R); "
        "mixed: C (above: R; below: N); no difference to X shown: D; below X on all metrics: E."
    )
    assert verdict({}, "X") == ""


def test_a_published_copy_has_the_same_report(tmp_path: Path) -> None:
    methods = [each for each in METHODS if each["group"] == "main"]
    datasets = {"Beauty": ["letter"], "Yelp": ["letter"]}
    out = write_experiment(tmp_path / "out", datasets=datasets, seeds=(42,), methods=methods)
    (out / "Yelp/seed_42/letter/gflowgr-tb/evaluation/analysis.json").unlink()  # not done yet
    copy = tmp_path / "exact_flows"
    assert main(["experiment", "--out", str(out), "--publish", str(copy)]) == 0
    assert not list(copy.rglob("items.npy"))
    assert np.load(copy / "Beauty/seed_42/letter/s-dpo/evaluation/ranks.npy").dtype == np.int8
    assert "/secret" not in (copy / "experiment.json").read_text()
    first = json.loads((copy / "results.json").read_text())
    assert main(["experiment", "--out", str(copy), "--report"]) == 0
    again = json.loads((copy / "results.json").read_text())
    assert again["settings"] == first["settings"]
    original = [settings_of(each) for each in summarise(read_results(out))]
    assert [settings_of(each) for each in summarise(read_results(copy))] == original


def settings_of(setting: Setting) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(setting)))


def generate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(end.value.code or 0)


def test_the_results_in_readme_and_docs_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(monkeypatch, "--check") == 0


def test_the_readme_gets_the_exact_flows_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = [f"<!-- results exact_flows: {place} -->" for place in ("begin", "end")]
    page = tmp_path / "README.md"
    page.write_text(f"{marks[0]}\n{marks[1]}\n")
    assert generate(monkeypatch, "--root", str(tmp_path)) == 0
    assert "not committed yet" in page.read_text()
    joint = method("Flow KL joint", 0.42)
    folder = tmp_path / "benchmarks" / "results" / "exact_flows"
    datasets = {"Beauty": ["letter"], "Yelp": ["letter"]}
    methods = [method(BASELINE, 0.27), joint]
    write_experiment(folder, datasets=datasets, seeds=(42,), methods=methods)
    (folder / "Yelp/seed_42/letter/sft_continued/evaluation/analysis.json").unlink()
    write_report(folder)
    assert generate(monkeypatch, "--root", str(tmp_path)) == 0
    text = page.read_text()
    rows = [line for line in text.splitlines() if "Flow KL joint" in line]
    (beauty, together, yelp, yelp_together) = rows
    p = r"(0\.00\d|< 0\.001)"
    assert re.fullmatch(
        rf"\| Beauty \| Flow KL joint, 1 seed \|( 0\.\d{{4}} \|){{4}} 17 \| {p}(, {p}){{3}} \|",
        beauty,
    )
    assert yelp.endswith("| 17 |  |")  # no control there yet
    for line in (together, yelp_together):
        assert "| Flow KL joint + SASRec, 1 seed |" in line
    assert "differences to SFT continued" in text
    assert "1 results of the experiment are missing" in text


def test_the_results_page_gets_the_main_tables(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "benchmarks" / "results" / "made_up"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text((out / "results.json").read_text())
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    marks = [f"<!-- results methods: {place} -->" for place in ("begin", "end")]
    path.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    assert generate(monkeypatch, "--check", "--root", str(tmp_path)) == 1
    assert generate(monkeypatch, "--root", str(tmp_path)) == 0
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert f"above {BASELINE} on all metrics: {FULL}" in text
    assert "without r_a" not in text
    assert generate(monkeypatch, "--check", "--root", str(tmp_path)) == 0
    path.write_text(f"{marks[0]}\nno end\n")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="must be followed by"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
