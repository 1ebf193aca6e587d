"""scib-metrics' aggregate table: its rule, its figures on the same cells, and how it is shown."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scib_cells import measured_cells, scib_cells

import atlas
from atlas.cli import main
from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.measures import NO_BEFORE, compare_embeddings
from atlas.evaluation.metrics import Measure, Metrics
from atlas.evaluation.scib_table import BATCH, BIO, scib_table
from atlas.evaluation.score_figure import draw_scores, inline_scores

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "scib_reference.json").read_text())
AGGREGATES = ("Bio conservation", "Batch correction", "Total")


def metrics_of(values: dict[str, float | None], error: float | None = 0.01) -> Metrics:
    names = {title: name for name, title in {**BIO, **BATCH}.items()}
    measures = tuple(
        Measure(
            names[title],
            title,
            "",
            "score",
            value=value,
            standard_error=None if value is None else error,
            skipped="told why" if value is None else None,
        )
        for title, value in values.items()
    )
    return Metrics(9, 2, 0, measures, None, None)


@pytest.fixture(scope="module")
def measured() -> Metrics:
    return measured_cells()


def test_the_rule_is_that_of_get_results() -> None:
    """On made-up scores that were put into scib-metrics' Benchmarker."""
    theirs = REFERENCE["get_results"]
    table = scib_table(
        {
            name: metrics_of({t: v for t, v in scores.items() if t not in AGGREGATES})
            for name, scores in theirs.items()
        }
    )
    assert table.embeddings == ("scvi", "pca")
    frame = table.to_frame()
    assert list(frame.columns) == list(theirs["scvi"])
    assert list(frame.index) == ["scvi", "pca", "Metric Type"]
    for name, scores in theirs.items():
        for title, value in scores.items():
            assert table[name, title].value == pytest.approx(value, abs=1e-12)
            assert frame.loc[name, title] == table[name, title].value
    assert frame.loc["Metric Type", "BRAS"] == "Batch correction"
    assert frame.loc["Metric Type", "Total"] == "Aggregate score"


@pytest.mark.parametrize("leiden", [False, True])
def test_scores_are_the_benchmarkers_on_the_same_cells(measured: Metrics, leiden: bool) -> None:
    """Without KBET, which is another measure on purpose."""
    if leiden:
        pytest.importorskip("igraph", reason="the extra leiden is not installed")
    theirs = REFERENCE["benchmarker"]["with_leiden" if leiden else "default"]
    without = replace(
        measured, measures=tuple(m for m in measured.measures if m.name != "kbet_by_label")
    )
    table = scib_table({"z": without}, leiden=leiden)
    assert {s.title for s in table.scores} == {*theirs, "KBET"}
    for title, value in theirs.items():
        assert table["z", title].value == pytest.approx(value, abs=1e-3), title
    assert table["z", "Total"].skipped == "without KBET"


def test_what_has_no_value_is_left_out_and_said() -> None:
    values = dict.fromkeys({**BIO, **BATCH}.values(), 0.5) | {"cLISI": 1.0, "iLISI": None}
    del values["PCR comparison"]
    table = scib_table({"a": metrics_of(values)})
    assert table["a", "Bio conservation"].value == pytest.approx((4 * 0.5 + 1) / 5)
    assert table["a", "Batch correction"].value == pytest.approx(0.5)
    assert table["a", "Total"].value == pytest.approx(0.6 * 0.6 + 0.4 * 0.5)
    assert table["a", "Total"].skipped == "without iLISI, PCR comparison"
    assert table.missing == {
        "iLISI": "told why",
        "PCR comparison": "it needs an embedding before integration",
    }
    none = scib_table({"a": metrics_of(dict.fromkeys(BATCH.values()))})
    assert none["a", "Total"].value is None
    assert none["a", "Total"].skipped == "a class has no value"
    json.dumps([*table.to_json(), *none.to_json()], allow_nan=False)
    assert "nan" not in none.to_csv().lower()
    with pytest.raises(ConfigError, match="no embedding"):
        scib_table({})


def test_scores_of_different_measures_say_that_they_do_not_compare() -> None:
    half: dict[str, float | None] = dict.fromkeys({**BIO, **BATCH}.values(), 0.5)
    table = scib_table(
        {
            "a": metrics_of({**half, "iLISI": None, "KBET": None}),
            "b": metrics_of({**half, "KBET": None}),
        }
    )
    said = "without iLISI, KBET; others have iLISI, so that these scores do not compare"
    assert table["a", "Batch correction"].skipped == table["a", "Total"].skipped == said
    assert table["b", "Total"].skipped == "without KBET"


def test_graph_connectivity_alone_is_no_batch_correction() -> None:
    values = dict.fromkeys(BIO.values(), 0.5) | {"Graph connectivity": 0.9}
    table = scib_table({"a": metrics_of(values)})
    assert table["a", "Graph connectivity"].value == 0.9
    assert table["a", "Bio conservation"].value == 0.5
    assert table["a", "Batch correction"].value is None
    assert table["a", "Total"].skipped == "a class has no value"


def test_the_error_of_an_aggregate_is_an_upper_bound() -> None:
    """Of 2,000 draws of ten scores, together or apart, the totals vary no more than it says."""
    rng = np.random.default_rng(2)
    values = dict.fromkeys({**BIO, **BATCH}.values(), 0.5)
    bound = scib_table({"a": metrics_of(values, 0.01)})["a", "Total"].standard_error
    assert bound == pytest.approx(0.01)
    for shared in (0.0, 1.0):
        noise = rng.standard_normal((2000, 10)) * np.sqrt(1 - shared)
        noise += rng.standard_normal((2000, 1)) * np.sqrt(shared)
        totals = 0.5 + 0.01 * (noise[:, :5].mean(1) * 0.6 + noise[:, 5:].mean(1) * 0.4)
        assert totals.std() < 1.05 * bound
    assert scib_table({"a": metrics_of(values, None)})["a", "Total"].standard_error is None


def test_it_is_written_as_text_and_drawn() -> None:
    half = dict.fromkeys({**BIO, **BATCH}.values(), 0.5)
    table = scib_table(
        {
            "low <b>": metrics_of({**half, "BRAS": 0.125}),
            "high": metrics_of({**half, "BRAS": 0.875, "iLISI": None}),
        }
    )
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    assert rows[0][0] == "Embedding"
    assert [row[0] for row in rows[1:]] == ["low <b>", "high", "Metric Type"]
    assert rows[2][rows[0].index("iLISI")] == ""
    svg = inline_scores(table)
    assert svg.startswith("<svg")
    assert "low &lt;b&gt;" in svg
    assert "<b>" not in svg
    assert "http" not in svg
    assert svg.index("high") < svg.index("low"), "the best total comes first"
    for text in ("0.12", "0.88", "Bio conservation", "Total", "–"):
        assert text in svg
    assert inline_scores(table) == svg
    for suffix, magic in (("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        drawn = draw_scores(table, suffix)  # type: ignore[arg-type]
        assert drawn.startswith(magic)
        assert draw_scores(table, suffix) == drawn  # type: ignore[arg-type]


def test_a_comparison_has_it(measured: Metrics) -> None:
    cells = scib_cells()
    compared = compare_embeddings(
        {"z": cells["z"], "before": cells["before"]},
        Categories(cells["batches"], "xyz"),
        Categories(cells["labels"], "abcde"),
        before=cells["before"],
    )
    table = compared.scib_table()
    one = scib_table({"z": measured})
    for title in AGGREGATES:
        assert table["z", title].value == one["z", title].value
    assert table["z", "Batch correction"].value > table["before", "Batch correction"].value
    assert table["before", "PCR comparison"].value == pytest.approx(0, abs=1e-6)
    assert compared.to_json()["scores"] == table.to_json()


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_study: Any
) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    store.append(make_study(), study="one", batch_key="batch", label_key="cell_type")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        z = rng.standard_normal((store.n_obs, 3)).astype(np.float32)
        store.write_embedding(name, z + store.obs_codes["label"][:, None], {})
    path, base = str(tmp_path / "s.atlas"), ["compare", str(tmp_path / "s.atlas")]
    base += ["--embedding", "a", "b", "--before", "a"]
    assert main([*base, "--scib", str(tmp_path / "t.docx")]) == 2
    assert "csv, svg, png, pdf" in capsys.readouterr().err
    files = [str(tmp_path / f"t.{suffix}") for suffix in ("csv", "svg")]
    assert main([*base, "--scib", *files]) == 0
    out = capsys.readouterr().out
    assert "a, bio conservation" in out
    assert (tmp_path / "t.csv").read_text().startswith("Embedding,Isolated labels")
    assert "<svg" in (tmp_path / "t.svg").read_text()
    assert main(["evaluate", path, "--embedding", "a"]) == 0
    told = capsys.readouterr().out
    assert "a, bio conservation" in told
    assert "PCR comparison" in told
    report = tmp_path / "report.html"
    assert main(["report", path, "--embedding", "a", "--beside", "b", "--out", str(report)]) == 0
    html = report.read_text()
    assert "<h2>Scores</h2>" in html
    assert f"PCR comparison ({NO_BEFORE})" in html
