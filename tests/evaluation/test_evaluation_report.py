"""The report: self-contained, escaped, complete; its palette, maps and projections."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from atlas import files
from atlas.errors import ConfigError
from atlas.evaluation.codes import Categories
from atlas.evaluation.figures import LossRecord, draw_losses, draw_map
from atlas.evaluation.labels import Confusion
from atlas.evaluation.measures import evaluate_embedding
from atlas.evaluation.palette import UNLABELED_COLOUR, palette
from atlas.evaluation.projection import project
from atlas.evaluation.report import (
    AddedLabel,
    AddedStudy,
    ReportInputs,
    render_report,
    write_report,
)

HOSTILE = "<script>alert('T & \"B\"')</script>"
N = 40  # too few for UMAP, which takes seconds to import


def made_inputs(n: int = N, labels: bool = True) -> ReportInputs:
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 3, size=n)
    z = (rng.standard_normal((n, 3)) + 4 * np.eye(4)[codes, :3]).astype(np.float32)
    batches = Categories(np.arange(n) % 2, ["one", HOSTILE])
    labelled = Categories(codes, ["$T_4$ cell", HOSTILE, "NK"]) if labels else None
    return ReportInputs(
        title=f"Blood {HOSTILE}",
        embedding_name="scvi",
        embedding=z,
        studies=Categories(np.arange(n) // (n // 2 + 1), ["kang", HOSTILE]),
        batches=batches,
        labels=labelled,
        n_genes=12_543,
        n_modelled_genes=2_000,
        study_genes=(11_111, 9_876),
        metrics=evaluate_embedding(z, batches, labelled, mixing_k=(50, 15), label_k=5),
        history=tuple(LossRecord(e, 900 / e, 950 / e if e % 2 else None) for e in range(1, 9)),
        commands=(f"atlas ingest {HOSTILE}",),
        settings={"n_latent": HOSTILE},
        versions={"torch": "2.13.0"},
        created="2026-01-12",
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would take them apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(made_inputs())


def test_loads_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "embed", "base"}
    for _, name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "data", "srcset", "action"}:
            assert value.startswith(("data:image/png;base64,", "#")), value[:80]
        assert not name.startswith("on")
    assert not re.search(r"https?://|url\((?!#)|@import", html)
    assert "default-src 'none'" in html


def test_strings_of_users_are_escaped(html: str) -> None:
    assert "<script" not in html.lower()
    text = Page(html).text
    # Title twice, study, batch and label legends, study table, confusion matrix twice, tag on the
    # map, command, setting.
    assert text.count(HOSTILE) >= 10
    assert "$T_4$ cell" in text


def test_says_all_numbers(html: str) -> None:
    inputs = made_inputs()
    page = Page(html)
    text = re.sub(r"\s+", " ", page.text)
    for number in ("12,543", "2,000", "11,111", "9,876"):
        assert number in text
    titles = [value for _, name, value in page.attributes if name == "title"]
    for measure in inputs.metrics.measures:
        assert measure.title in text
        if measure.value is None:
            assert str(measure.skipped) in text
        else:
            assert str(measure.value) in titles
            assert f"{measure.value:.3f} ± {measure.standard_error:.3f}" in text
    assert inputs.metrics.confusion is not None
    for count in inputs.metrics.confusion.counts.ravel():
        assert f">{count}</td>" in html
    assert inputs.labels is not None
    unlabeled = int((inputs.labels.codes < 0).sum())
    assert f"unlabeled{unlabeled}" in page.text
    assert "torch" in text
    assert "All 40 cells are shown" in text
    assert str(inputs.metrics.label_protocol) in text


def test_says_that_the_maps_are_sampled() -> None:
    text = re.sub(r"\s+", " ", Page(render_report(made_inputs(), max_cells=25, seed=4)).text)
    assert "Shown are 25 of 40 cells, drawn at random (seed 4)." in text


def test_without_labels_history_and_measures() -> None:
    inputs = dataclasses.replace(made_inputs(labels=False), history=(), commands=(), versions={})
    html = render_report(inputs)
    page = Page(html)
    assert "By label" not in page.text
    assert "svg" not in page.tags
    assert "no cell has a label" in page.text
    assert "Labels found by neighbours" not in page.text


def test_one_cell_and_one_dimension() -> None:
    inputs = made_inputs()
    one = np.arange(1)
    tiny = dataclasses.replace(
        inputs,
        embedding=inputs.embedding[:1, :1],
        studies=inputs.studies[one],
        batches=inputs.batches[one],
        labels=None,
        metrics=evaluate_embedding(inputs.embedding[:1, :1], inputs.batches[one]),
    )
    assert "drawn by the embedding itself" in Page(render_report(tiny)).text


def test_is_the_same_twice(html: str) -> None:
    assert render_report(made_inputs()) == html


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    assert write_report(made_inputs(), path) == path
    before = path.read_text()
    assert before.startswith("<!DOCTYPE html>")

    def fail(path: Path, data: bytes) -> None:
        path.write_bytes(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        write_report(made_inputs(), path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_refuses_a_folder_that_is_not_there_and_arrays_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"folder of the report is not there(.|\n)*nowhere"):
        write_report(made_inputs(), tmp_path / "nowhere" / "report.html")
    short = dataclasses.replace(made_inputs(), studies=Categories([0], ["a"]))
    with pytest.raises(ConfigError, match="studies and embedding have different numbers"):
        render_report(short)
    genes = dataclasses.replace(made_inputs(), study_genes=(1,))
    with pytest.raises(ConfigError, match="study_genes do not fit"):
        render_report(genes)


def test_map_draws_categories_over_unlabeled_cells() -> None:
    xy = np.zeros((1000, 2), dtype=np.float32)
    xy[0] = 1.0
    codes = np.where(np.arange(1000) == 500, 0, -1)  # one labeled cell under 998 others
    drawn = draw_map(
        "Label",
        xy,
        Categories(codes, ["B"]),
        counts=np.array([1]),
        uncategorised=999,
        tags=False,
        seed=0,
    )
    png = base64.b64decode(drawn.image.removeprefix("data:image/png;base64,"))
    pixels = (matplotlib.image.imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)
    hexes = {"#{:02x}{:02x}{:02x}".format(*p) for p in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert {palette(1)[0], UNLABELED_COLOUR} <= hexes
    assert [(entry.name, entry.cells) for entry in drawn.legend] == [("B", 1), ("unlabeled", 999)]


def test_map_of_fifty_categories_is_numbered() -> None:
    rng = np.random.default_rng(1)
    codes = np.arange(500) % 50
    names = [f"type {i}" for i in range(50)]
    xy = rng.standard_normal((500, 2)).astype(np.float32)
    drawn = draw_map(
        "Label",
        xy,
        Categories(codes, names),
        counts=np.full(50, 10),
        uncategorised=0,
        tags=True,
        seed=0,
    )
    assert [entry.number for entry in drawn.legend] == list(range(1, 51))
    assert {tag.text for tag in drawn.tags} == {str(i) for i in range(1, 51)}
    assert len({entry.colour for entry in drawn.legend}) == 50


def test_palette_begins_alike_and_stays_apart() -> None:
    assert palette(0) == ()
    assert palette(8)[:5] == palette(5)
    assert palette(3) == ("#0072b2", "#e69f00", "#009e73")
    assert len(set(palette(60))) == 60
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in palette(12)], dtype=float)
    # Under deuteranopia red and green cones see alike: lightness and blue must tell them apart.
    linear = ((rgb / 255 + 0.055) / 1.055) ** 2.4
    seen = np.column_stack([linear @ [0.33, 0.65, 0.02], linear[:, 2]]) ** (1 / 3)
    gaps = np.linalg.norm(seen[:, None] - seen[None], axis=2)[np.triu_indices(12, 1)]
    assert gaps.min() > 0.04


def test_loss_figure_has_both_curves_and_no_outside_reference() -> None:
    svg = draw_losses([LossRecord(1, 700.0, None), LossRecord(2, 600.0, 650.0)])
    assert svg.startswith("<svg")
    assert "viewBox" in svg
    assert "training" in svg
    assert "validation" in svg
    assert "http" not in svg
    assert "validation" not in draw_losses([LossRecord(1, 700.0)])


def test_projection_of_few_cells_is_by_principal_components() -> None:
    z = np.random.default_rng(2).standard_normal((30, 5)).astype(np.float32) * [9, 4, 1, 1, 1]
    drawn = project(z.astype(np.float32))
    assert drawn.method == "principal components"
    spread = np.linalg.svd(z - z.mean(0), compute_uv=False)[:2]
    np.testing.assert_allclose(np.linalg.norm(drawn.xy, axis=0), spread, rtol=1e-5)


@pytest.mark.parametrize("places", [1, 4])
def test_projection_of_cells_at_few_places(places: int) -> None:
    at = np.random.default_rng(2).standard_normal((places, 5)).astype(np.float32)
    z = at[np.arange(100) % places]
    drawn = project(z)
    assert drawn.method == "principal components"
    for place in range(places):
        own = drawn.xy[np.arange(100) % places == place]
        np.testing.assert_allclose(own, np.repeat(own[:1], len(own), axis=0), atol=1e-5)
    assert len(np.unique(drawn.xy.round(3), axis=0)) == places


@pytest.mark.long
def test_umap_is_seeded_sampled_and_keeps_groups_together() -> None:
    rng = np.random.default_rng(3)
    group = np.arange(300) % 3
    z = (rng.standard_normal((300, 6)) + 12 * np.eye(6)[group]).astype(np.float32)
    drawn = project(z, max_cells=150, seed=5)
    assert drawn.method == "UMAP"
    assert drawn.xy.shape == (150, 2)
    own = group[drawn.rows]
    centres = np.stack([drawn.xy[own == g].mean(axis=0) for g in range(3)])
    closest = np.linalg.norm(drawn.xy[:, None] - centres, axis=2).argmin(axis=1)
    assert (closest == own).mean() > 0.95
    np.testing.assert_array_equal(drawn.xy, project(z, max_cells=150, seed=5).xy)


def test_says_what_was_added() -> None:
    confusion = Confusion(("B", HOSTILE), ("B", "Unknown"), np.array([[31, 4], [7, 52]]))
    study = AddedStudy(
        name=HOSTILE, version=3, cells=94_321, unknown_share=0.595, entropy=0.5,
        entropy_ceiling=0.625, bound_before=-812.125, bound_after=-799.5,
        advice=(f"look at {HOSTILE}",), groups=((HOSTILE, 41, ("MS4A1", HOSTILE)),),
        labels=(AddedLabel(HOSTILE, 38, 0.125, 0.875),), confusion=confusion,
    )  # fmt: skip
    plain = dataclasses.replace(
        study,
        name="late_study",
        unknown_share=None,
        advice=(),
        groups=(),
        labels=(),
        confusion=None,
    )
    assert "Studies that were added" not in Page(render_report(made_inputs())).text
    html = render_report(dataclasses.replace(made_inputs(), added=(study, plain)))
    assert "<script" not in html.lower()
    text = re.sub(r"\s+", " ", Page(html).text)
    for told in ("94,321", "59.5%", "80.0%", "-812.125", "-799.500", "0.125", "0.875", "MS4A1"):
        assert told in text
    for count in (31, 4, 7, 52):
        assert f">{count}</td>" in html
    assert text.count("late_study") == 2
