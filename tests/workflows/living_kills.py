"""Updates killed at each of their steps, and gone on with: run as a script by the test.

It imports torch once, never computes itself, and forks a child for each attempt.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atlas
import atlas.store.append
import atlas.store.base
import atlas.store.fork
import atlas.training.loop
import atlas.workflows.living as living
import atlas.workflows.newcomers as newcomers
import atlas.workflows.unfinished as unfinished
from atlas.evaluation.index import NeighborIndex

OPTIONS: dict[str, Any] = {
    "study": "kang",
    "model": "scvi",
    "ingest": {"batch_key": "batch", "label_key": "cell_type"},
    "max_epochs": 3,
    "minibatch_size": 64,
    "average_steps": 4,
    "checkpoint_steps": 2,
    "threads": 1,
    "device": "cpu",
}


def _kill(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(function: Callable[..., Any], calls: int = 1) -> Callable[..., Any]:
    """The function, killed after so many calls."""
    made = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal made
        found = function(*arguments, **options)
        made += 1
        if made == calls:
            _kill()
        return found

    return call


def steps() -> dict[str, tuple[Any, str, Callable[..., Any]]]:
    """Where to kill: an object, the name of its function, and what takes its place."""
    trainer = atlas.training.loop.Trainer
    return {
        "after the fork": (unfinished, "fork", _after(unfinished.fork)),
        "ingest": (atlas.store.append, "digests", _kill),
        "before surgery": (living, "extend_reference", _kill),
        "within surgery": (trainer, "save", _after(trainer.save, 3)),
        "after surgery": (living, "extend_reference", _after(living.extend_reference)),
        "embedding": (living, "embed_study", _kill),
        "index": (living, "write_index", _after(living.write_index)),
        "within the index": (NeighborIndex, "save", _kill),
        "index linked": (atlas.store.base.embeddings, "copy_part", _kill),
        "after the labels": (newcomers, "transfer_labels", _after(newcomers.transfer_labels)),
        "after the groups": (living, "group_unseen", _after(living.group_unseen)),
        "drift": (living, "measure_drift", _kill),
        "model": (
            atlas.store.base.models,
            "write",
            _after(atlas.store.base.models.write),
        ),
        "files linked": (atlas.store.fork.manifests, "commit", _commit_of("update")),
        "at the end": (living, "publish", _after(living.publish)),
    }


def _commit_of(action: str) -> Callable[..., Any]:
    commit = atlas.store.fork.manifests.commit

    def call(root: Path, newest: Any, what: str, **changes: Any) -> Any:
        return _kill() if what.startswith(action) else commit(root, newest, what, **changes)

    return call


def attempt(store: Path, query: Path, step: str | None) -> tuple[bool, list[str]]:
    """Update in a child; whether it was killed, and its notes."""
    notes = store.with_suffix(".notes")
    if (child := os.fork()) == 0:
        if step is not None:
            place, name, function = steps()[step]
            setattr(place, name, function)
        made = atlas.workflows.update(store, query, **OPTIONS)
        notes.write_text(json.dumps(made.notes))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL, []
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the update failed: {step}")
    return False, json.loads(notes.read_text())


def main(base: Path, query: Path, out: Path) -> None:
    """Kill at each step, go on, and note what came of it."""
    found = {}
    for step in (None, *steps()):
        store = out / (step or "undisturbed").replace(" ", "-")
        shutil.copytree(base, store)
        killed, _ = attempt(store, query, step) if step is not None else (None, [])
        after_kill = sorted(path.name for path in (store / "manifests").glob("0*.json"))
        _, notes = attempt(store, query, None)
        found[store.name] = {"killed": killed, "manifests": after_kill, "notes": notes}
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
