"""A second store over the same files, to work in for a while, and its result as one state.

::

    FORK/manifests, genes           the store's files, linked
    FORK/studies, parts, models     folders of their own; in them a link to each of the store's

A fork is a store like any other: what writes to stores writes to it, step after step, each
committed, and what is new lies in the fork alone. Readers of the store see nothing of it until
:func:`publish` makes one state of all that was done. The store's lock is held meanwhile.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from atlas import files
from atlas.store import manifest as manifests
from atlas.store.schema import Manifest, Part

UPDATE = ".update-"
"""Before the name of a study: the folder in the store where an update of it works in a fork."""

_NUMBER = re.compile(r"-\d{6}$")


def fork(root: Path, folder: Path, state: Manifest) -> None:
    """Make a fork of a store at one of its states; it copies nothing.

    Parameters
    ----------
    root
        The store.
    folder
        Where; a crash leaves nothing there. What is to be published is on the same file system.
    state
        The newest state that the fork is to have.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("manifests", "genes", "studies", "parts"):
        (partial / name).mkdir(parents=True)
    states = [one for one in manifests.history(root) if one.number <= state.number]
    paths = {manifests.manifest_path(root, one.number).relative_to(root) for one in states}
    paths |= {Path(path) for one in states for path in one.paths}
    inside = folder.absolute().is_relative_to(root.absolute())  # then both are moved together
    for path in sorted(paths):
        link, target = partial / path, (root / path).absolute()
        link.parent.mkdir(parents=True, exist_ok=True)
        where = os.path.relpath(target, (folder.absolute() / path).parent) if inside else target
        link.symlink_to(where, target_is_directory=target.is_dir())
    partial.rename(folder)


def publish(root: Path, newest: Manifest, forked: Path, action: str) -> Manifest:
    """Make the newest state of a fork the next one of its store.

    New files are linked into the store, so that the fork stays whole until the manifest is there; a
    crash before it leaves the store as it was.

    Parameters
    ----------
    root, newest
        The store and its newest state, from which the fork was made; the caller holds the lock.
    forked
        The fork.
    action
        What the state did, for the history.
    """
    state = manifests.read(forked)
    known = {path for one in manifests.history(root) for path in one.paths}
    new = {path: _named(path, newest.number + 1) for path in sorted(state.paths - known)}
    for path, name in new.items():
        _link(forked / path, root / name)

    def moved(part: Part) -> Part:
        return replace(part, path=new.get(part.path, part.path))

    return manifests.commit(
        root,
        newest,
        action,
        genes=replace(state.genes, path=new.get(state.genes.path, state.genes.path)),
        studies=tuple(
            replace(study, parts={name: moved(part) for name, part in study.parts.items()})
            for study in state.studies
        ),
        batches=state.batches,
        labels=state.labels,
        embeddings={
            name: replace(
                one,
                details=moved(one.details),
                index=None if one.index is None else moved(one.index),
            )
            for name, one in state.embeddings.items()
        },
        gene_selection=state.gene_selection,
        models={name: replace(one, part=moved(one.part)) for name, one in state.models.items()},
    )


def _named(path: str, number: int) -> str:
    """The path of something new: parts and gene tables have the number of their manifest."""
    if path.startswith("genes/"):
        return f"genes/{number:06d}.json"
    return _NUMBER.sub(f"-{number:06d}", path) if path.startswith("parts/") else path


def _link(source: Path, target: Path) -> None:
    """The same files a second time, by hard links."""
    above = [target.parent]  # folders that may be new, up to the store's own
    while not above[-1].is_dir():
        above.append(above[-1].parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
        files.sync_tree(target)
    else:
        os.link(source, target)
    for folder in above:
        files.sync_folder(folder)
