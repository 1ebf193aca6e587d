"""Dropping a study: a state without it, and on demand a history without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from atlas import files
from atlas.errors import StoreError
from atlas.store import manifest as manifests
from atlas.store import models
from atlas.store.arrays import read_array
from atlas.store.fork import UPDATE
from atlas.store.schema import Manifest, ModelEntry


@dataclass(frozen=True, slots=True)
class DropReport:
    """What a drop did.

    Attributes
    ----------
    study
        The name, which is free again.
    n_obs
        Its cells in the newest state; 0 where it was dropped before.
    manifest
        Number of the newest state now.
    removed_states
        Numbers of the states that were removed with ``purge``.
    kept_states
        Numbers of the older states that hold the study still.
    kept_bytes, freed_bytes
        Size of its files that stay for them, and of what was deleted.
    genes_without_study
        Genes chosen to be modelled that no study measured that is left.
    models, embeddings
        Versions of kept models that know the study, such as ``scvi 2``, and embeddings that had its
        cells. They stay, the embeddings without these cells.
    removed_models
        Versions that only the removed states named, and so went with them.
    """

    study: str
    n_obs: int
    manifest: int
    removed_states: tuple[int, ...]
    kept_states: tuple[int, ...]
    kept_bytes: int
    freed_bytes: int
    genes_without_study: int
    models: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    removed_models: tuple[str, ...] = ()


def drop_study(root: Path, study: str, *, purge: bool) -> tuple[Manifest, DropReport]:
    """Commit a state without a study; see :meth:`atlas.store.CountStore.drop`.

    Returns
    -------
    The newest state of the store, and what was done.
    """
    with manifests.writer(root, f"drop {study}") as newest:
        history = manifests.history(root)
        dropped = [entry for entry in newest.studies if entry.name == study]
        holding = [s.number for s in history if study in (entry.name for entry in s.studies)]
        if not dropped and not (purge and holding):
            do = f"states {holding} hold it still: --purge removes them" if holding else None
            if (root / f"{UPDATE}{study}").is_dir():
                interrupted = (
                    "an update by it was interrupted: --unfinished removes what that has done"
                )
                do = interrupted if do is None else f"{do}; {interrupted}"
            raise StoreError(
                "The store has no such study",
                found=study,
                expected="one of " + (", ".join(e.name for e in newest.studies) or "(none)"),
                do=do,
                path=root,
            )
        kept = _versions(root, newest)
        knowing = [
            name
            for name, entry in kept.items()
            if study in models.record(root, entry).get("studies", ())
        ]
        folders = {
            folder
            for state in history
            for entry in state.studies
            if entry.name == study
            for folder in (entry.path, *(part.path for part in entry.parts.values()))
        }
        size = sum(_size(root / folder) for folder in folders)
        state = newest
        if dropped:
            left = tuple(entry for entry in newest.studies if entry.name != study)
            embeddings = {  # an index of rows that are gone is none
                name: replace(one, index=None)
                if any(f"embedding:{name}" in entry.parts for entry in dropped)
                else one
                for name, one in newest.embeddings.items()
            }
            state = manifests.commit(
                root, newest, f"drop {study}", studies=left, embeddings=embeddings
            )
        if purge:  # the state without it is there by now: a crash leaves no more than it found
            try:
                for number in holding:
                    manifests.manifest_path(root, number).unlink()
                files.sync_folder(root / "manifests")
            except OSError as error:
                raise StoreError(
                    "The study was dropped, but not all older states could be removed",
                    found=str(error),
                    do="mend the disk, then run the command again",
                    path=root,
                ) from error
        left_models = _versions(root, state)
        gone = {name: entry for name, entry in kept.items() if name not in left_models}
        size += sum(_size(root / entry.part.path) for entry in gone.values())
    return state, DropReport(
        study=study,
        n_obs=sum(entry.n_obs for entry in dropped),
        manifest=state.number,
        removed_states=tuple(holding) if purge else (),
        kept_states=() if purge else tuple(holding),
        kept_bytes=0 if purge else size,
        freed_bytes=size if purge else 0,
        genes_without_study=_without_study(root, state),
        models=tuple(name for name in knowing if name not in gone),
        embeddings=tuple(
            name
            for name in newest.embeddings
            if any(f"embedding:{name}" in entry.parts for entry in dropped)
        ),
        removed_models=tuple(gone),
    )


def _versions(root: Path, state: Manifest) -> dict[str, ModelEntry]:
    """Versions of all models up to a state, by names such as ``scvi 2``."""
    return {
        f"{name} {version}": entry
        for name in state.models
        for version, entry in models.versions(root, state, name).items()
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _without_study(root: Path, state: Manifest) -> int:
    """Chosen genes that no study of a state measured."""
    if state.gene_selection is None:
        return 0
    measured = np.zeros(state.genes.n_vars, bool)
    for entry in state.studies:
        columns = read_array(root, entry.parts["index"], "genes")
        measured[columns[columns >= 0]] = True
    names = manifests.read_gene_table(root, state).names
    there = {name for name, is_there in zip(names, measured, strict=True) if is_there}
    return sum(gene not in there for gene in state.gene_selection.genes)
