"""``atlas bench``: each task is measured, reports are kept, read and compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import atlas
from atlas.cli import main
from atlas.cli.benching import sizes
from atlas.errors import ConfigError, InputError
from atlas.workflows.scaling import BenchReport, Row, compare_reports, read_report

SMALL = ["--genes", "60", "--batches", "2", "--device", "cpu"]


def row(cells: int, rate: float) -> Row:
    return Row(cells, 60, 2, 1.0, rate, "cells/s", 10**6, {})


REPORT = BenchReport("loader", {"seed": 0}, {"cores": 2}, {}, (row(100, 50.0), row(1000, 40.0)))


def test_sizes_are_read() -> None:
    assert sizes("10k, 1.5M,7") == [10_000, 1_500_000, 7]
    with pytest.raises(Exception, match="no list of sizes"):
        sizes("10x")


def test_the_loader_at_two_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: str(tmp_path / name) for name in ("one.json", "two.json", "plot.svg")}
    command = ["bench", "loader", "--cells", "300,600", *SMALL, "--work", str(tmp_path / "work")]
    assert main([*command, "--json", files["one.json"], "--plot", files["plot.svg"]]) == 0
    report = read_report(files["one.json"])
    assert [row.size for row in report.rows] == [(300, 60, 2), (600, 60, 2)]
    for measured in report.rows:
        assert measured.rate > 0
        assert measured.seconds > 0
    assert report.to_json()["machine"]["cores"] >= 1
    assert "<svg" in Path(files["plot.svg"]).read_text()
    assert "600" in capsys.readouterr().out
    # the stores are there for the next run
    made = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert made == ["300-60-2-0.atlas", "600-60-2-0.atlas"]
    told = json.loads(Path(files["one.json"]).read_text())
    for measured in told["rows"]:
        measured["rate"] *= 1e6
    Path(files["two.json"]).write_text(json.dumps(told))
    assert main([*command, "--against", files["two.json"]]) == 1
    assert capsys.readouterr().out.count("slower") == 2


@pytest.mark.long
@pytest.mark.parametrize("task", ["train", "embed", "neighbours", "update"])
def test_the_other_tasks(tmp_path: Path, task: str) -> None:
    report = atlas.bench(
        task, [400], genes=[60], batches=[2], modelled=40, device="cpu", work=tmp_path / "work"
    )
    (measured,) = report.rows
    assert measured.rate > 0
    assert measured.seconds > 0
    if task == "neighbours":
        assert measured.more["recall"] == 1.0
    if task == "update":
        assert measured.unit == "new cells/s"


def test_rows_are_compared() -> None:
    new = replace(REPORT, rows=(row(100, 41.0), row(1000, 31.0), row(10_000, 1.0)))
    changes = compare_reports(new, REPORT)
    assert [(change.row.cells, change.slower) for change in changes] == [(100, False), (1000, True)]
    assert changes[0].ratio == pytest.approx(0.82)
    with pytest.raises(ConfigError, match="seed: 0 then, 1 now"):
        compare_reports(replace(new, settings={"seed": 1}), REPORT)
    with pytest.raises(ConfigError, match="task: loader then, train now"):
        compare_reports(replace(new, task="train"), REPORT)
    with pytest.raises(ConfigError, match="no size that both have"):
        compare_reports(replace(new, rows=(row(5, 1.0),)), REPORT)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such task"):
        atlas.bench("nothing")
    with pytest.raises(ConfigError, match="1 or more"):
        atlas.bench("loader", [0])
    with pytest.raises(ConfigError, match="makes what it measures"):
        atlas.bench("update", store=tmp_path)
    file = tmp_path / "other.json"
    file.write_text("{}")
    with pytest.raises(InputError, match="no report of atlas bench"):
        read_report(file)
