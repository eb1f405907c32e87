"""Without a terminal, progress is a line every half minute at most."""

from __future__ import annotations

import numpy as np
import pytest
from tqdm.auto import tqdm

from gflowgr import progress
from gflowgr.identifiers import fit_kmeans
from gflowgr.progress import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute_and_no_frames(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """As the runner of cells does it: a new postfix at each poll, and messages above the bar."""
    with progress_bar(total=14, desc="smoke", unit="cell") as bar:
        for second in range(100):
            clock[0] = float(second)
            bar.update(second % 10 == 0)
            bar.set_postfix_str(f"beauty/seed_{second}")
            if second == 50:
                tqdm.write("a message")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "\r" not in "".join(lines)
    assert all(line.startswith("smoke:") for line in lines)
    assert "/14 [" in lines[0]
    assert "beauty/seed_30" in lines[0] or "beauty/seed_29" in lines[0]


def test_what_ends_within_half_a_minute_says_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress_bar(range(5), desc="calibration", leave=False)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_levels_of_k_means_are_told(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gflowgr.identifiers import kmeans

    fit = kmeans.fit_centres

    def slow(*arguments: object) -> object:
        clock[0] += 40
        return fit(*arguments)

    monkeypatch.setattr(kmeans, "fit_centres", slow)
    fit_kmeans(np.eye(4, dtype=np.float32), levels=2, codebook_size=2, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("k-means:") for line in lines)
    fit_kmeans(np.eye(4, dtype=np.float32), levels=2, codebook_size=2)
    assert capsys.readouterr().err == ""
