"""Writing HDF5 files so that a full disk is an error and not a crash.

When HDF5 cannot write what it holds, closing the file fails, and the library ends the process with
a segmentation fault when the interpreter leaves. Here it writes to a Python file that notes the
first error and takes no bytes from then on; HDF5 closes in peace, and the error is raised after.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py


class _Sink(io.FileIO):
    """A file whose writes do not fail; ``error`` is the first that would have."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, or pretend to."""
        view = memoryview(data).cast("B")
        at = self.tell()
        if self.error is None:
            try:
                written = 0
                while written < len(view):
                    written += super().write(view[written:])
                return len(view)
            except OSError as error:
                self.error = error
        self.seek(at + len(view))
        return len(view)

    def readinto(self, buffer: Any, /) -> int:
        """Read; what was only pretended to be written reads as zeros."""
        view = memoryview(buffer).cast("B")
        found = super().readinto(view) or 0
        if self.error is not None and found < len(view):
            view[found:] = bytes(len(view) - found)
            return len(view)
        return found

    def truncate(self, size: int | None = None, /) -> int:
        """Set the size, or pretend to."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


class Hdf5Writer:
    """An HDF5 file that is being written.

    Attributes
    ----------
    file
        To write to with h5py or anndata.
    """

    def __init__(self, sink: _Sink, file: h5py.File) -> None:
        self._sink = sink
        self.file = file

    def check(self) -> None:
        """Raise the error of a write that has failed already, rather than at the end."""
        if self._sink.error is not None:
            raise self._sink.error


@contextmanager
def create_hdf5(path: Path) -> Iterator[Hdf5Writer]:
    """Create an HDF5 file, synced when it is whole.

    Raises
    ------
    OSError
        It could not be written; a part of it may be left.
    """
    with _Sink(path, "w+") as sink:
        with h5py.File(sink, "w") as file:
            writer = Hdf5Writer(sink, file)
            yield writer
        writer.check()
        os.fsync(sink.fileno())
