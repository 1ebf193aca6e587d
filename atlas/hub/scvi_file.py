"""The file that scvi-tools saves a model in, read without running anything that it says.

``model.pt`` is a pickle. It is read by torch's ``weights_only`` reader, which builds tensors and
plain containers alone. What else scvi-tools puts there is taken by the classes below, which keep
what they are given and look at it later: NumPy's own would follow any address that a file puts in
the state of an array of objects. A file that names anything else is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from atlas.errors import ModelError

FILE: Final = "model.pt"


class _Ignored:
    """Stands for what is not needed: takes everything and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Dtype:
    """Stands for ``numpy.dtype``."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name, self.order = name, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def items(self, data: Any) -> list[Any]:
        """Elements of this type from their bytes, or from the list that objects come in."""
        if self.name in ("O", "O8") and isinstance(data, list):
            return data
        known = isinstance(self.name, str) and re.fullmatch(r"[biufU]\d{1,4}", self.name)
        if not known or self.order not in ("<", ">", "|", "="):
            raise TypeError(f"an array of {self.name!r}")
        if isinstance(data, str):  # as protocol 2 has text in place of bytes
            data = data.encode("latin1")
        # its size and the length of the data are checked there
        elements: list[Any] = np.frombuffer(memoryview(data), self.order + str(self.name)).tolist()
        return elements


class _Array:
    """Stands for an array of NumPy."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _scalar(dtype: Any, data: Any) -> Any:
    (item,) = dtype.items(data)
    return item


def _dict(*_: Any) -> dict[Any, Any]:
    return {}


def _empty(*_: Any) -> bytes:
    return b""  # as protocol 2 makes it; other bytes come in another way


_KNOWN: Final[dict[str, Any]] = {
    "builtins.bytes": _empty,
    "builtins.dict": _dict,
    "collections.defaultdict": _dict,
    "numpy.dtype": _Dtype,
    **{f"{core}.multiarray._reconstruct": _Array for core in ("numpy._core", "numpy.core")},
    **{f"{core}.multiarray.scalar": _scalar for core in ("numpy._core", "numpy.core")},
    **dict.fromkeys(
        (
            "builtins.slice",
            "numpy.ndarray",
            "pandas._libs.internals._unpickle_block",
            "pandas.core.frame.DataFrame",
            "pandas.core.indexes.base.Index",
            "pandas.core.indexes.base._new_Index",
            "pandas.core.indexes.range.RangeIndex",
            "pandas.core.internals.managers.BlockManager",
            "pandas.core.internals.managers.SingleBlockManager",
            "pandas.core.series.Series",
        ),
        _Ignored,
    ),
}


def read(folder: Path) -> dict[str, Any]:
    """What the file of a folder holds; :func:`names` reads its arrays.

    Raises
    ------
    ModelError
        There is no file, or it cannot be read safely.
    """
    path = folder / FILE
    if not path.is_file():
        older = (folder / "model_params.pt").exists()
        raise ModelError(
            "There is no model of scvi-tools here",
            found="a model of before version 0.15" if older else f"no {FILE}",
            expected=f"a folder with {FILE}",
            do="load it in scvi-tools 1.x and save it again" if older else "check the folder",
            path=folder,
        )
    try:
        with torch.serialization.safe_globals([(stand, name) for name, stand in _KNOWN.items()]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise ModelError(
            "The file cannot be read safely",
            found=_reason(path) or f"{type(error).__name__}: {str(error)[:200]}",
            expected="tensors, arrays and plain values, as scvi-tools writes them",
            do="copy the file again; if it comes from someone else, do not load it at all",
            path=path,
        ) from None
    if not isinstance(saved, dict):
        raise ModelError("The file is not a model of scvi-tools", found=type(saved), path=path)
    return saved


def names(values: Any) -> list[str]:
    """The elements of a saved array or list, as text.

    Raises
    ------
    TypeError, ValueError, AttributeError
        It is neither, or is not in order.
    """
    if isinstance(values, _Array):
        _, _, dtype, _, data = values.state
        values = dtype.items(data)
    if not isinstance(values, list):
        raise TypeError(f"{type(values).__name__} in place of an array of names")
    return [str(value) for value in values]


def _reason(path: Path) -> str | None:
    """What the file names that nobody needs for a model."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a file that is damaged can fail in any way
        return None
    other = sorted(set(named) - set(_KNOWN))
    return f"it asks for {', '.join(other[:5])}" if other else None
