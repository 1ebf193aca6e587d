"""The model card of a shared reference, in Markdown.

The headings are those of Mitchell et al. 2019, "Model Cards for Model Reporting", as far as they
apply.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from atlas.evaluation.codes import Categories
from atlas.hub.manifest import About, IndexAbout
from atlas.models import TrainedModel

_MOST = 50


def model_card(
    about: About,
    model: TrainedModel,
    studies: Categories,
    batches: Categories,
    labels: Categories | None,
    columns: list[str],
    counts: bool,
    index: IndexAbout,
) -> str:
    """What a stranger should know before mapping cells with it.

    Parameters
    ----------
    about, model
        Of the package.
    studies, batches, labels
        Of the reference's cells.
    columns
        Names of the further obs columns in it.
    counts
        Whether the counts are in it.
    index
        Of the embedding.
    """
    config = model.config.to_json()
    epochs, versions = _training(model)
    bound = epochs[-1].get("validation_bound") if epochs else None
    made_by = ", ".join(_text(f"{name} {version}") for name, version in versions.items())
    trained = f"{len(epochs)} epoch{'' if len(epochs) == 1 else 's'}" + (
        f", negative bound on held-out cells {bound:.1f} nats" if isinstance(bound, float) else ""
    )
    lines = [
        f"# {_text(about.title)}",
        "",
        about.description or "_No description was given._",
        "",
        "## Details",
        "",
        f"- Model: {model.name}, {len(model.genes):,} genes, {config['n_latent']} dimensions",
        f"- Settings: {', '.join(f'{k} {v}' for k, v in config.items())}",
        f"- Training: {trained if epochs else 'not recorded'}",
        f"- Versions: {made_by or 'not recorded'}",
        f"- Licence: {_text(about.licence) if about.licence else 'none was given'}",
        f"- Citation: {about.citation or 'none was given'}",
        f"- Index: {_index(index)}",
    ]
    if covariates := [name for name, _ in model.columns.categorical]:
        lines.append(f"- Covariates: {', '.join(map(_text, covariates))}")
    lines += [
        "",
        "## Cells of the reference",
        "",
        f"{len(studies):,} cells. In the package: their embedding, study, batch"
        + (", label" if labels is not None else "")
        + (", list of the index" if index.has_lists else "")
        + "".join(f", {_text(name)}" for name in columns)
        + (", counts." if counts else "; not their counts, names, or other columns."),
        "",
        *_table("Study", studies),
        *_table("Batch", batches),
        *([] if labels is None else _table("Label", labels)),
        "## Use",
        "",
        "For mapping cells of the same species and tissue, given as raw counts, and carrying these "
        "labels over to them. Cells of a type, tissue or state that the reference does not have "
        "may get the label of what is nearest; look at the uncertainty.",
        "",
        "```",
        "atlas fetch PACKAGE --to reference",
        "atlas extend reference/model query.atlas --study NEW --out runs/mapped",
        "atlas embed runs/mapped query.atlas",
        "```",
        "",
        "An embedding is no anonymous form of cells: it may be told from it whether a cell was in "
        "the reference.",
        "",
    ]
    return "\n".join(lines)


def _index(index: IndexAbout) -> str:
    if not index.has_lists:
        return f"none in the package, search is exact: {_text(index.why)}"
    recall = "" if index.recall is None else f", {index.recall.value:.2%} of the true neighbours"
    recall += "" if index.recall is None else f" at k {index.recall.k}"
    return f"{index.n_lists:,} inverted lists, {index.breadth:,} looked at{recall}"


def _training(model: TrainedModel) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Epochs and versions; a model of a stranger may say anything there."""
    epochs: Any = model.training.get("history")
    versions: Any = model.training.get("versions")
    whole = isinstance(epochs, list) and all(isinstance(one, dict) for one in epochs)
    return epochs if whole else [], versions if isinstance(versions, dict) else {}


def _table(title: str, cells: Categories) -> list[str]:
    counts = cells.counts()
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    lines = [f"| {title} | cells |", "| --- | --- |"]
    lines += [f"| {_text(cells.names[i])} | {counts[i]:,} |" for i in order[:_MOST]]
    if len(order) > _MOST:
        rest = counts[order[_MOST:]].sum()
        lines.append(f"| {len(order) - _MOST:,} more | {rest:,} |")
    if (none := len(cells) - int(counts.sum())) > 0:
        lines.append(f"| none | {none:,} |")
    return [*lines, ""]


def _text(name: str) -> str:
    """A name that cannot end a cell of a table, a line, or begin something else."""
    line = " ".join(name.split())
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in line)
