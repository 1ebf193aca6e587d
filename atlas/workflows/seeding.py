"""Seed labels: cells that fit the signature of a type best."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from os import PathLike

import numpy as np
import numpy.typing as npt
import pandas as pd

from atlas.errors import ConfigError, InputError
from atlas.signatures import (
    Aliases,
    Resolved,
    Signature,
    choose_seeds,
    read_signatures,
    resolve,
    score_cells,
)
from atlas.signatures.genes import unknown_genes
from atlas.signatures.reading import Given
from atlas.store import CountStore, FilesSource
from atlas.store.annotate import STUDY_COLUMN
from atlas.workflows.rows import Rows, rows_where


@dataclass(frozen=True, slots=True)
class SeedGene:
    """A gene of the signatures.

    Attributes
    ----------
    asked, name
        As in the signature, and as in the store; None for one that was left out.
    detected
        Share of the scored cells in which it has counts.
    """

    asked: str
    name: str | None
    detected: float


@dataclass(frozen=True, slots=True, eq=False)
class SeedLabels:
    """What :func:`seed_labels` found.

    Attributes
    ----------
    signatures
        With the genes that were used, as in the store.
    genes
        Every gene asked for.
    n_seeds
        Of each signature.
    n_shared
        Cells among the top of more than one signature.
    n_scored
        Cells that were scored.
    labels
        int64, (n_obs,), in the order of the store: signature of each seed, -1 for the other cells.
    scores
        float64, (n_obs, n_signatures): NaN for cells not chosen, and for cells without counts.
    columns
        obs columns written to the store: the label, then the score in each signature.
    """

    signatures: tuple[Signature, ...]
    genes: tuple[SeedGene, ...]
    n_seeds: tuple[int, ...]
    n_shared: int
    n_scored: int
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    columns: tuple[str, ...]


def seed_labels(
    store: CountStore | FilesSource,
    signatures: Given,
    *,
    name: str | None = "seed",
    top: int = 50,
    rows: Rows | None = None,
    aliases: str | PathLike[str] | None = None,
    ignore_missing: bool = False,
    as_label: bool = False,
    unlabeled: str = "Unknown",
    progress: bool = False,
) -> SeedLabels:
    """Label the cells that fit signatures best, as seeds for a model that labels the others.

    Scores are those of the scANVI paper (Xu et al. 2021, Online Methods, "Signature calculus"; see
    :func:`atlas.signatures.score_cells`), streamed from the store in two passes. The seeds of a
    signature are its ``top`` cells, as far as they score above a cell that shows none of its genes;
    a cell among the top of several goes to the one in which it scores highest, and to none between
    equals (:func:`atlas.signatures.choose_seeds`).

    Parameters
    ----------
    store
        An open store, or files as they are.
    signatures
        A file (see :func:`atlas.signatures.read_signatures`), ``{"CD4 Naive": "CCR7+ CD69-"}``, or
        signatures.
    name
        obs column for the labels; ``NAME_score_SIGNATURE`` holds the scores. The cells chosen get
        new values, others keep theirs, and so do score columns of signatures that are not asked for
        again. None writes nothing.
    top
        Seeds of a signature.
    rows
        The cells to score, and to standardise over, by an obs column: ``"study=zheng"``.
    aliases
        A table of names of genes, beside those shipped; see
        :meth:`atlas.signatures.Aliases.read`.
    ignore_missing
        Leave out genes that the store lacks, or that a study of the cells did not measure, with a
        warning.
    as_label
        Make the seeds the store's labels in place of those it has, in the studies of the cells.
    unlabeled
        What cells that are no seeds have in the column.
    progress
        Show cells/s and the time left on stderr.

    Raises
    ------
    InputError
        The signatures cannot be read, or are wrong in themselves; a gene is not in the store, not
        measured in a study, or may be several; a signature keeps no positive gene.
    ConfigError, MissingColumnError
        An option is out of range; the column is there and holds something else; no such rows.
    """
    given = read_signatures(signatures)
    _check_options(store, given, name, top, as_label, unlabeled)
    chosen = np.ones(store.n_obs, bool) if rows is None else rows_where(store, rows)
    resolved = _resolved(store, given, aliases, chosen, ignore_missing)
    used = _used(store, given, resolved)
    genes = list(dict.fromkeys(gene for s in used for gene in (*s.positive, *s.negative)))
    signs = np.array(
        [[(gene in s.positive) - (gene in s.negative) for gene in genes] for s in used], np.int64
    )
    place = {gene.name: gene.position for gene in resolved.values()}
    # files opened over chosen genes have totals over all of them too
    whole = store if isinstance(store, CountStore) else store.select(store.gene_table.names)
    scores = score_cells(
        whole,
        store.select(genes),
        np.array([place[gene] for gene in genes], np.int64),
        signs,
        chosen,
        progress=progress,
    )
    detected = dict(zip(genes, scores.detected.tolist(), strict=True))
    if silent := [gene for gene in genes if not detected[gene]]:
        warnings.warn(
            "No cell that was scored has counts of " + ", ".join(silent), UserWarning, stacklevel=2
        )
    seeds = choose_seeds(scores, top)
    columns: tuple[str, ...] = ()
    if name is not None and isinstance(store, CountStore):
        table = _table(store, chosen, seeds.labels, scores.values, used, name, unlabeled)
        columns = tuple(table.columns[1:])
        store.annotate(table, label_key=name if as_label else None, unlabeled=unlabeled)
    return SeedLabels(
        signatures=used,
        genes=tuple(
            SeedGene(gene.asked, gene.name, detected[gene.name] if gene.name else 0.0)
            for gene in resolved.values()
        ),
        n_seeds=tuple(int((seeds.labels == i).sum()) for i in range(len(used))),
        n_shared=seeds.n_shared,
        n_scored=scores.n_scored,
        labels=seeds.labels,
        scores=scores.values,
        columns=columns,
    )


def _check_options(
    store: CountStore | FilesSource,
    signatures: tuple[Signature, ...],
    name: str | None,
    top: int,
    as_label: bool,
    unlabeled: str,
) -> None:
    """What can be known to be wrong before a cell is read."""
    if top < 1:
        raise ConfigError("The number of seeds is out of range", found=top, expected="at least 1")
    if unlabeled in {signature.name for signature in signatures}:
        raise ConfigError(
            "A signature has the name that stands for no label",
            found=repr(unlabeled),
            do="rename it, or choose another value with --unlabeled",
        )
    if name is None:
        if as_label:
            raise ConfigError("Seeds that become labels need a name", do="give name=")
        return
    if not isinstance(store, CountStore) or store.url is not None:
        raise ConfigError(
            "Labels can be written to a store on disk only",
            found=repr(store),
            do="give name=None and use what is returned, or work on the store where it is",
            path=store.path,
        )
    columns = store.obs().columns
    if name in columns and not any(str(c).startswith(f"{name}_score_") for c in columns):
        raise ConfigError(
            f"The store has an obs column {name!r} that this command did not write",
            found=", ".join(map(str, columns)),
            expected="a new name, or that of seeds",
            do="choose another name with --name",
            path=store.path,
        )


def _resolved(
    store: CountStore | FilesSource,
    signatures: tuple[Signature, ...],
    aliases: str | PathLike[str] | None,
    chosen: npt.NDArray[np.bool_],
    ignore_missing: bool,
) -> dict[str, Resolved]:
    """The gene of the store for each gene asked for; position -1 for those left out."""
    known = Aliases.shipped()
    if aliases is not None:
        known = Aliases.read(aliases).over(known)
    asked = [gene for s in signatures for gene in (*s.positive, *s.negative)]
    resolved = resolve(asked, store.gene_table, known, store.path)
    if absent := [gene.asked for gene in resolved.values() if gene.name is None]:
        if not ignore_missing:
            raise unknown_genes(absent, store.gene_table, known, store.path)
        warnings.warn(
            "Genes that the store does not have are left out: " + ", ".join(absent),
            UserWarning,
            stacklevel=3,
        )
    # A cell of a study that did not measure a gene would be scored as if the gene were silent.
    studies = np.unique(store.obs_codes["study"][chosen])
    names = list(dict.fromkeys(gene.name for gene in resolved.values() if gene.name is not None))
    measured = store.select(names).presence[studies] if names else np.ones((len(studies), 0), bool)
    partly = {name for i, name in enumerate(names) if not measured[:, i].all()}
    if not partly:
        return resolved
    told = "; ".join(
        f"{name} not in {', '.join(store.studies[s] for s in studies[~measured[:, i]])}"
        for i, name in enumerate(names)
        if name in partly
    )
    if not ignore_missing:
        raise InputError(
            "Some studies did not measure these genes of the signatures",
            found=told,
            expected="genes that every study of the cells has measured",
            do="label studies one by one (--rows study=NAME), or leave these genes out "
            "(--ignore-missing)",
            path=store.path,
        )
    warnings.warn(f"Genes that a study did not measure are left out: {told}", stacklevel=3)
    return {
        asked: Resolved(asked, None, -1) if gene.name in partly else gene
        for asked, gene in resolved.items()
    }


def _used(
    store: CountStore | FilesSource,
    signatures: tuple[Signature, ...],
    resolved: dict[str, Resolved],
) -> tuple[Signature, ...]:
    """The signatures in genes of the store."""
    out = []
    for signature in signatures:
        positive, negative = (
            [(gene, found) for gene in genes if (found := resolved[gene].name) is not None]
            for genes in (signature.positive, signature.negative)
        )
        if not positive:
            raise InputError(
                f"No positive gene of the signature {signature.name!r} is left",
                found=", ".join(signature.positive),
                expected="at least one in every study of the cells",
                do="leave the signature out, or give other genes",
                path=store.path,
            )
        seen: dict[str, str] = {}
        for asked, found in [*positive, *negative]:
            if found in seen:
                raise InputError(
                    f"The signature {signature.name!r} has a gene twice",
                    found=f"{seen[found]} and {asked} are both {found}",
                    expected="each once, with one sign",
                    path=store.path,
                )
            seen[found] = asked
        out.append(
            Signature(signature.name, tuple(g for _, g in positive), tuple(g for _, g in negative))
        )
    return tuple(out)


def _table(
    store: CountStore,
    chosen: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    signatures: tuple[Signature, ...],
    name: str,
    unlabeled: str,
) -> pd.DataFrame:
    """What is written: a row for each cell chosen, its study first."""
    names = [*(signature.name for signature in signatures), unlabeled]
    studies = np.array(store.studies, dtype=object)
    columns = {
        STUDY_COLUMN: studies[store.obs_codes["study"][chosen]],
        name: pd.Categorical.from_codes(
            np.where(labels < 0, len(signatures), labels)[chosen], pd.Index(names, dtype=object)
        ),
        **{
            f"{name}_score_{signature.name}": scores[chosen, i]
            for i, signature in enumerate(signatures)
        },
    }
    return pd.DataFrame(columns, index=store.obs([]).index[chosen])
