"""Where benchmarks keep their figures."""

from __future__ import annotations

import stat
from pathlib import Path

from benchmarks.results_file import entries, merge


def test_a_measurement_takes_the_place_of_the_one_before_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "results" / "figures.json"
    for part, name, figure in (("turns", "default", 1), ("turns", "long", 2), ("start", "default", 3)):
        merge(file, part, name, {"figure": figure}, command="bench", packages=())
    merge(file, "turns", "default", {"figure": 4}, command="bench again", packages=())
    assert {name: entry["figure"] for name, entry in entries(file, "turns").items()} == {"default": 4, "long": 2}
    assert entries(file, "turns")["default"]["command"] == "bench again"
    assert entries(file, "start")["default"]["figure"] == 3
    assert [each.name for each in file.parent.iterdir()] == ["figures.json"]


def test_figures_that_nobody_wants_go_to_the_null_device_which_stays_one() -> None:
    null = Path("/dev/null")
    merge(null, "turns", "default", {"figure": 1}, command="bench", packages=())
    assert entries(null, "turns") == {}
    assert stat.S_ISCHR(null.stat().st_mode)
