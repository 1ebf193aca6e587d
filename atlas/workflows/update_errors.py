"""What an update says of errors: by the atlas's own paths, and options that an update has.

Its steps are those of other commands, at work in a folder of the update (:mod:`atlas.store.fork`),
and say what these can do about an error. Here, and only here, that is put into an update's words;
the error as it was raised is the cause of the one that is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError, CorruptStoreError, TrainingError

_ANEW = "start the update anew with --fresh"

_WORDS: tuple[tuple[str, str], ...] = (
    # training: the run folder is the update's, which goes on by itself
    (r"then go on with --resume", "then run the same command again: it goes on"),
    (r"resume with --device \w+, or train anew .*", f"go on on such a device, or {_ANEW}"),
    (r"resume on a (.*), or train anew .*", rf"go on on a \1, or {_ANEW}"),
    (r"resume with the .*", _ANEW),
    (r"restore the run folder from a copy, or train anew .*", _ANEW),
    (r"train anew into another folder", _ANEW),
    (r"wait for it to end, or train into another folder", "wait for it to end"),
    (r"train again, or fetch the folder again from where it came", _ANEW),
    (
        r"train with a lower --lr or without --precision bfloat16, and look for extreme counts; .*",
        "update with a lower --lr (from Python without precision='bfloat16' too), and look for "
        "extreme counts; the atlas is as it was",
    ),
    (
        r"lower --validation-share, or append more cells",
        "update by a study of more cells (from Python with a lower validation_share too)",
    ),
    # what an update calls its obs columns is given by the model's name
    (
        r"give another (--)?name(, or rename that column in the input)?$",
        "rename that column in the input",
    ),
    # the study is in no store yet that could be annotated, and the model's columns are what it has
    (
        r"fill them in with `atlas annotate`, or leave the covariate out",
        "fill them in in the input: the model was trained with this covariate",
    ),
    (
        r"calibrate by another column \(--calibrate-by\), or do without calibration",
        "do without calibration: --false-unknown 0",
    ),
    # options of `atlas ingest` that `atlas update` lacks
    (
        r"measurement=(\S+) in Python, --measurement \S+",
        r"from Python: atlas.update(…, ingest={'measurement': \1})",
    ),
    (r"; name them with --layer and --measurement", "; name a layer with --layer"),
    (
        r"train the reference with (--encode-batch --norm layer)",
        r"train the reference anew: `atlas train … \1`",
    ),
)
"""What to do, in the words of other commands and of an update."""


@contextmanager
def told_of_the_atlas(root: Path, work: Path) -> Iterator[None]:
    """Raise errors of the body as errors of the atlas at ``root``.

    Parameters
    ----------
    root
        The store.
    work
        The folder that the update works in: a fork of the store in ``store``, a run in ``run``.

    Raises
    ------
    AtlasError
        Of the same kind. Paths of the fork are those of the store; of what only the update has,
        the path is the store's, and what was found says which file it was.
    """
    try:
        yield
    except AtlasError as error:
        told = _told(error, root, work)
        if str(told) == str(error):
            raise
        raise told from error


def _told(error: AtlasError, root: Path, work: Path) -> AtlasError:
    found, do, path = error.found, error.do, error.path
    if path is not None and Path(path).is_relative_to(work):
        own = Path(path).relative_to(work)
        path = _in_the_atlas(root, own)
        if path is None:
            path = root
            if isinstance(error, TrainingError) and isinstance(found, str):
                found = re.sub(r"(listed in )(?=[^/]+\)$)", rf"\g<1>{work.name}/{own}/", found)
            elif work.exists() and not (work / own).is_dir():  # a file, damaged or missing
                found = f"{work.name}/{own}" if found is None else f"{found} ({work.name}/{own})"
            if isinstance(error, CorruptStoreError):
                do = _ANEW
    for pattern, words in _WORDS:
        do = None if do is None else re.sub(pattern, words, do)
    texts: list[Any] = [
        _paths_of_the_atlas(text, root, work) if isinstance(text, str) else text
        for text in (error.what, found, error.expected, do)
    ]
    return type(error)(texts[0], found=texts[1], expected=texts[2], do=texts[3], path=path)


def _in_the_atlas(root: Path, own: Path) -> Path | None:
    """The store's file that something in the update's folder is; None where only that has it."""
    if own.parts[:1] != ("store",):
        return None
    path = root.joinpath(*own.parts[1:])
    return path if path.exists() else None


def _paths_of_the_atlas(text: str, root: Path, work: Path) -> str:
    """A text with paths of the fork as those of the store, wherever the store has them."""

    def of_the_atlas(match: re.Match[str]) -> str:
        path = _in_the_atlas(root, Path(match[0]).relative_to(work))
        return match[0] if path is None else str(path)

    return re.sub(re.escape(str(work)) + r"/[^\s'\",;:()]*", of_the_atlas, text)
