"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from atlas.errors import ConfigError
from atlas.evaluation import told
from atlas.evaluation.codes import UNLABELED, Categories
from atlas.evaluation.figures import LossRecord, Map, draw_losses, draw_map
from atlas.evaluation.labels import Confusion
from atlas.evaluation.metrics import Difference, Measure, Metrics
from atlas.evaluation.neighbours import Embedding
from atlas.evaluation.projection import Projection, project
from atlas.evaluation.scib_table import ScibTable
from atlas.evaluation.score_figure import inline_scores
from atlas.files import replace_bytes


@dataclass(frozen=True, slots=True)
class AddedLabel:
    """Cells of a study that was added, by the label that they got.

    Attributes
    ----------
    name
        The label, or ``Unknown``.
    cells
        How many got it.
    uncertainty, distance
        Their mean uncertainty and mean distance score.
    """

    name: str
    cells: int
    uncertainty: float
    distance: float


@dataclass(frozen=True, slots=True)
class AddedStudy:
    """A study that an update added to the model of the embedding.

    Attributes
    ----------
    name, version, cells
        Of the study, of the model that knows it, and its cells.
    unknown_share, entropy, entropy_ceiling, bound_before, bound_after, advice
        Its drift, see :class:`atlas.workflows.drift.Drift`.
    groups
        Groups of its Unknown cells: name, cells and markers.
    labels
        What its cells were labelled; empty where nothing was transferred.
    confusion
        Of its own labels and these; None where it has none.
    """

    name: str
    version: int
    cells: int
    unknown_share: float | None
    entropy: float
    entropy_ceiling: float
    bound_before: float
    bound_after: float
    advice: tuple[str, ...] = ()
    groups: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    labels: tuple[AddedLabel, ...] = ()
    confusion: Confusion | None = None


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """All that a report tells.

    Attributes
    ----------
    title
        Heading, for instance the name of the store.
    embedding_name, embedding
        Name and values, float32 (n_cells, d).
    studies, batches, labels
        Of every cell; labels -1 for none, or None without any.
    n_genes, n_modelled_genes
        Genes of the store, and those that the model saw.
    study_genes
        Genes that each study measured, in the order of ``studies.names``.
    metrics
        From :func:`atlas.evaluation.measures.evaluate_embedding`.
    individual_name, before_name
        Names of the batches' own embeddings, and of the embedding before integration, that it is
        measured beside; None for none.
    differences
        To other embeddings of the same cells, this one first.
    scores
        scib-metrics' aggregate scores of this embedding and of those beside it; None for none.
    added
        Studies that updates added to the model of the embedding, in their order.
    history
        Losses by epoch; empty where no training is known.
    commands
        What was run to get here, one line each.
    settings, versions
        Options of model and training, and versions of the software, by name.
    created
        Date and time, as it should be read.
    """

    title: str
    embedding_name: str
    embedding: Embedding
    studies: Categories
    batches: Categories
    labels: Categories | None
    n_genes: int
    n_modelled_genes: int
    study_genes: tuple[int, ...]
    metrics: Metrics
    individual_name: str | None = None
    before_name: str | None = None
    differences: tuple[Difference, ...] = ()
    scores: ScibTable | None = None
    added: tuple[AddedStudy, ...] = ()
    history: tuple[LossRecord, ...] = ()
    commands: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""


@dataclass(frozen=True, slots=True)
class _StudyRow:
    name: str
    cells: int
    genes: int
    batches: int
    labels: int
    unlabeled: float


@dataclass(frozen=True, slots=True)
class _GroupTable:
    """Measures of single batches, or of single labels: a row for each, a column for a measure."""

    kind: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Measure | None, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One field of the confusion matrix: count, and share of its row."""

    count: int
    share: float
    right: bool


@dataclass(frozen=True, slots=True)
class _ConfusionRow:
    name: str
    cells: tuple[_Cell, ...]
    total: int


def write_report(
    inputs: ReportInputs, path: str | os.PathLike[str], *, max_cells: int = 100_000, seed: int = 0
) -> Path:
    """Write the report; it appears whole or not at all.

    Parameters
    ----------
    inputs
        What it tells.
    path
        HTML file to write; one that is there is replaced.
    max_cells
        Cells above this number are sampled for the maps, and the report says so.
    seed
        Of the sample, the maps and the order of drawing.

    Raises
    ------
    ConfigError
        The folder is not there, the file is a folder, or the arrays are of different lengths.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(
            "the report would be written over a folder", do="name a file in it", path=target
        )
    if not target.parent.is_dir():
        raise ConfigError(
            "the folder of the report is not there",
            do="make the folder, or name another file",
            path=target.parent,
        )
    replace_bytes(target, render_report(inputs, max_cells=max_cells, seed=seed).encode())
    return target


def render_report(inputs: ReportInputs, *, max_cells: int = 100_000, seed: int = 0) -> str:
    """The report as one HTML document; see :func:`write_report`."""
    _check_lengths(inputs)
    projection = project(inputs.embedding, max_cells=max_cells, seed=seed)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("atlas.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=_count, figure=_figure, percent=_percent, by=told.by, confusion_rows=_confusion_rows
    )
    labels = inputs.labels
    return environment.get_template("report.html.j2").render(
        inputs=inputs,
        n_cells=len(inputs.embedding),
        n_batches=len(inputs.batches.present()),
        n_labels=0 if labels is None else len(labels.present()),
        labeled=0.0 if labels is None else float((labels.codes != UNLABELED).mean()),
        studies=_study_rows(inputs),
        findings=_findings(inputs.metrics),
        projection=projection,
        seed=seed,
        maps=_maps(inputs, projection, seed),
        measures=[m for m in inputs.metrics.measures if m.skipped is None],
        notes=told.notes(inputs.metrics.measures),
        skipped=told.skipped(inputs.metrics.measures),
        exactness=told.exactness(inputs.metrics.measures),
        groups=_group_tables(inputs.metrics.groups),
        scores=None if inputs.scores is None else Markup(inline_scores(inputs.scores)),
        losses=Markup(draw_losses(inputs.history)) if inputs.history else None,
    )


def _check_lengths(inputs: ReportInputs) -> None:
    given: dict[str, Any] = {
        "studies": inputs.studies,
        "batches": inputs.batches,
        "labels": inputs.labels,
    }
    for name, values in given.items():
        if values is not None and len(values) != len(inputs.embedding):
            raise ConfigError(
                f"{name} and embedding have different numbers of cells",
                found=f"{len(values)} and {len(inputs.embedding)}",
                expected="one entry per cell, in the same order",
            )
    if len(inputs.study_genes) != len(inputs.studies.names):
        raise ConfigError(
            "study_genes do not fit the studies",
            found=f"{len(inputs.study_genes)} numbers",
            expected=f"one for each of {len(inputs.studies.names)} studies",
        )


def _study_rows(inputs: ReportInputs) -> list[_StudyRow]:
    rows = []
    for code, name in enumerate(inputs.studies.names):
        own = inputs.studies.codes == code
        cells = int(own.sum())
        labels = np.full(cells, UNLABELED) if inputs.labels is None else inputs.labels.codes[own]
        rows.append(
            _StudyRow(
                name=name,
                cells=cells,
                genes=inputs.study_genes[code],
                batches=len(np.unique(inputs.batches.codes[own])),
                labels=len(np.unique(labels[labels != UNLABELED])),
                unlabeled=float((labels == UNLABELED).mean()) if cells else 0.0,
            )
        )
    return rows


def _maps(inputs: ReportInputs, projection: Projection, seed: int) -> list[Map]:
    """By label (the widest one), batch and study."""
    kinds = [("Batch", inputs.batches), ("Study", inputs.studies)]
    if inputs.labels is not None and len(inputs.labels.present()):
        kinds.insert(0, ("Label", inputs.labels))
    return [
        draw_map(
            title,
            projection.xy,
            categories[projection.rows],
            counts=categories.counts(),
            uncategorised=int((categories.codes == UNLABELED).sum()),
            tags=title == "Label",
            seed=seed,
        )
        for title, categories in kinds
    ]


def _findings(metrics: Metrics) -> list[str]:
    """The measures that come first, as sentences."""
    found: list[str] = []
    for measure in metrics.measures:
        if measure.value is None:
            continue
        margin = "" if measure.standard_error is None else f" (± {measure.standard_error:.2%})"
        if measure.name.startswith("mixing_share_of_ceiling") and not found:
            found.append(
                f"Batches are mixed to {measure.value:.1%}{margin} of what dealing cells out to "
                "batches at random would give."
            )
        if measure.name == f"label_accuracy_k{measure.k}":
            found.append(
                f"{measure.value:.1%}{margin} of the labeled cells get their own label from the "
                f"{measure.k} nearest labeled neighbours."
            )
    return found


def _group_tables(groups: Sequence[Measure]) -> list[_GroupTable]:
    """By batch and by label, in the order in which they were measured."""
    tables = []
    for word in ("batch", "label"):
        mine = [measure for measure in groups if (measure.of or "").startswith(f"{word} ")]
        if mine:
            titles = {measure.name: told.title(measure) for measure in mine}
            by_name = {(str(measure.of), measure.name): measure for measure in mine}
            rows = tuple(
                (of.removeprefix(f"{word} "), tuple(by_name.get((of, name)) for name in titles))
                for of in dict.fromkeys(of for of, _ in by_name)
            )
            tables.append(_GroupTable(word, tuple(titles.values()), rows))
    return tables


def _confusion_rows(confusion: Confusion) -> list[_ConfusionRow]:
    return [
        _ConfusionRow(
            name=name,
            cells=tuple(
                _Cell(int(count), float(count / counts.sum()), predicted == name)
                for count, predicted in zip(counts, confusion.predicted, strict=True)
            ),
            total=int(counts.sum()),
        )
        for name, counts in zip(confusion.truth, confusion.counts, strict=True)
    ]


def _count(value: int) -> str:
    return f"{value:,}"


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"
