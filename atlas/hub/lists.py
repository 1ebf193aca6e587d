"""The index of a shared reference: its lists as safetensors, read as what a stranger wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from atlas.errors import ConfigError
from atlas.evaluation.index.arrays import ListArrays
from atlas.hub.manifest import IndexAbout

_TYPES: Final = {"centre": "F64", "centroids": "F32", "assigned": "I32"}


def tensors_of_lists(lists: ListArrays) -> dict[str, npt.NDArray[Any]]:
    """What ``index.safetensors`` holds."""
    return {name: np.ascontiguousarray(getattr(lists, name)) for name in _TYPES}


def read_lists(path: Path, about: IndexAbout, embedding: npt.NDArray[np.float32]) -> ListArrays:
    """The lists of a file, which are of this embedding, float32 (n_obs, n_latent).

    Nothing of it is read before it has the types and shapes that it should.

    Raises
    ------
    ConfigError, SafetensorError
        It has not, or the lists are none of the embedding.
    """
    n, d = embedding.shape
    shapes = {"centre": [d], "centroids": [about.n_lists, d], "assigned": [n]}
    expected = {name: (kind, shapes[name]) for name, kind in _TYPES.items()}
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
        if found != expected:
            raise ConfigError(
                "the tensors of the index are not those of package.json and the embedding",
                found=str(found)[:300],
                expected=expected,
            )
        tensors = {name: file.get_tensor(name) for name in _TYPES}
    lists = ListArrays(
        **tensors, breadth=about.breadth, seed=about.seed, recall_target=about.recall_target
    )
    lists.check(embedding)
    return lists
