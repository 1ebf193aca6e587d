"""What `atlas verify` finds: a report of faults, each with its place and what to do."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas.errors import CorruptStoreError
from atlas.store.schema import Manifest, StudyEntry

MAX_FINDINGS = 1000
"""Findings that a report lists; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is broken.

    Attributes
    ----------
    study
        The study it belongs to; None for what belongs to the whole store.
    path
        The file or folder.
    what, found, expected
        What is wrong; what was found, and what should be there, where that can be said.
    do
        What mends it.
    """

    study: str | None
    path: str
    what: str
    found: str | None
    expected: str | None
    do: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification checked and found.

    Attributes
    ----------
    path
        The store.
    manifest
        Number of the newest state that is whole; 0 where none is.
    states, studies, chunks, bytes
        How much was checked; bytes as they lie on disk.
    seconds
        Wall time.
    findings
        All that is broken, in the order of the store.
    unlisted
        Findings beyond the first thousand.
    """

    path: str
    manifest: int
    states: int
    studies: int
    chunks: int
    bytes: int
    seconds: float
    findings: tuple[Finding, ...]
    unlisted: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is broken."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "whole": self.whole}

    def raise_first(self) -> None:
        """Raise the first finding as an error, if there is one.

        Raises
        ------
        CorruptStoreError
            Something is broken.
        """
        if self.whole:
            return
        first, others = self.findings[0], len(self.findings) + self.unlisted - 1
        raise CorruptStoreError(
            first.what + (f" ({others} more faults: `atlas verify`)" if others else ""),
            found=first.found,
            expected=first.expected,
            do=first.do,
            path=first.path,
        )


@dataclass(slots=True)
class Findings:
    """Collects findings, each once, up to a bound."""

    kept: list[Finding] = field(default_factory=list)
    unlisted: int = 0
    _seen: set[tuple[str, str, str | None]] = field(default_factory=set)

    def add(self, finding: Finding) -> None:
        """Keep a finding, unless the same was found of the same file already."""
        key = (finding.path, finding.what, finding.found)
        if key in self._seen:
            return
        if len(self.kept) >= MAX_FINDINGS:
            self.unlisted += 1
            return
        self._seen.add(key)
        self.kept.append(finding)


def ingest_again(root: Path, entry: StudyEntry, states: Sequence[Manifest]) -> str:
    """How to drop a study and ingest it again: the commands, as far as they are recorded.

    Parameters
    ----------
    root
        The store.
    entry
        The study.
    states
        States of the store, the oldest first: one of them records the command of the ingest.
    """
    drop = shlex.join(["atlas", "drop", str(root), entry.name, "--purge"])
    for state in states:
        if any(study.path == entry.path for study in state.studies):
            words = shlex.split(state.command)
            # options may have been typed before the store, which is then not easily told
            known = len(words) > 2 and not words[2].startswith("-")
            known = known and words[:2] == ["atlas", "ingest"]
            if known and state.action == f"append {entry.name}":
                words[2] = str(root)  # where the store is now
                return (
                    "restore it from a copy, or ingest the study again: "
                    f"{drop} && {shlex.join(words)}"
                )
            break
    # several inputs are recorded one behind the other
    one = Path(entry.source).exists()
    sources = [entry.source] if one else entry.source.split(", ")
    if all(Path(source).suffix for source in sources):
        again = ["atlas", "ingest", str(root), *sources, "--study", entry.name]
        if entry.profile != "fast":
            again += ["--profile", entry.profile]
        return (
            "restore it from a copy, or ingest the study again with the keys it had: "
            f"{drop} && {shlex.join(again)}"
        )
    return (
        f"restore it from a copy, or drop the study ({drop}) and append it again from where it "
        f"came: {entry.source}"
    )


def only_old(root: Path, numbers: Sequence[int]) -> str:
    """What to do about something that older states hold and the newest does not."""
    files = " ".join(shlex.quote(str(root / "manifests" / f"{n:06d}.json")) for n in numbers)
    return (
        "restore it from a copy; the newest state does not need it, and giving up the older "
        f"states that do makes the next writer remove it: rm {files}"
    )
