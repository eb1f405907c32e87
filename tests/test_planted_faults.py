"""The list of planted faults fits the source; ``python tests/planted_faults`` plants them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FAULTS = yaml.safe_load((ROOT / "tests/planted_faults/faults.yaml").read_text())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_a_planted_fault_changes_one_place_and_names_tests_that_exist(
    fault: dict[str, str | list[str]],
) -> None:
    assert fault["tests"]
    assert fault["old"] != fault["new"]
    assert (ROOT / str(fault["file"])).read_text().count(str(fault["old"])) == 1
    for test in fault["tests"]:
        file, _, name = test.partition("[")[0].partition("::")
        assert f"def {name.rpartition('::')[2]}(" in (ROOT / file).read_text()


def test_planted_faults_have_names_of_their_own() -> None:
    assert max(Counter(fault["name"] for fault in FAULTS).values()) == 1
