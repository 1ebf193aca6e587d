"""Which kind of search, by size and hardware."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from atlas.errors import ConfigError
from atlas.evaluation.exact import Device, import_faiss

Kind = Literal["exact", "flat", "ivf", "hnsw", "disk"]
"""``exact``: tiles with torch. ``flat``: the same tiles with FAISS, exact too. ``ivf``: inverted
lists, approximate. ``hnsw``: a graph, approximate. ``disk``: inverted lists in a file."""

KINDS: tuple[Kind, ...] = ("exact", "flat", "ivf", "hnsw", "disk")

_PATIENCE_SECONDS = 120.0
_PAIRS_A_SECOND = {"cpu": 2.5e8, "cuda": 5e10}
"""Of exact search, for each core, and for each GPU: what FAISS's flat index does on one core here,
and the estimate of notes/evaluation.md."""
_MEMORY_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is to search with.

    Attributes
    ----------
    cores
        That this process may use.
    memory_bytes
        Of the machine.
    has_faiss, faiss_gpus, torch_gpus
        Whether FAISS is installed, and GPUs that it and torch see.
    """

    cores: int
    memory_bytes: int
    has_faiss: bool
    faiss_gpus: int
    torch_gpus: int

    @classmethod
    def here(cls) -> Hardware:
        """This machine."""
        faiss = import_faiss()
        return cls(
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            has_faiss=faiss is not None,
            faiss_gpus=0 if faiss is None else int(faiss.get_num_gpus()),
            torch_gpus=torch.cuda.device_count(),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A kind of search, where it runs, and why it was taken, in words."""

    kind: Kind
    device: Device
    why: str


def choose(
    n: int,
    n_dimensions: int,
    n_queries: int,
    *,
    kind: Kind | Literal["auto"] = "auto",
    device: Device | Literal["auto"] = "auto",
    hardware: Hardware | None = None,
) -> Choice:
    """Choose how to search ``n`` rows for ``n_queries`` of them.

    Exact search is taken where it would take under two minutes; a sample of queries nearly always
    does. Above that, inverted lists: in memory, or in a file where the vectors would take more than
    half of the memory. HNSW is never chosen, only taken by name: it gives the same graph twice only
    when it is built by one thread.

    Raises
    ------
    ConfigError
        A kind or device by name that is not there.
    """
    check_names(kind, device)
    hardware = Hardware.here() if hardware is None else hardware
    if kind != "auto":
        return Choice(kind, _device(kind, device, hardware), "asked for by name")
    exact: Kind = "flat" if hardware.has_faiss else "exact"
    if hardware.torch_gpus and not hardware.faiss_gpus and device != "cpu":
        exact = "exact"  # torch on the GPU is ahead of FAISS on the CPU
    place = _device(exact, device, hardware)
    units = hardware.cores if place == "cpu" else 1
    pairs = float(n) * n_queries
    seconds = pairs / (_PAIRS_A_SECOND[place] * units)
    reckoned = f"{pairs:.2g} pairs, about {seconds:.2g} s on {place}"
    if seconds <= _PATIENCE_SECONDS:
        return Choice(exact, place, f"exact search is quick enough ({reckoned})")
    if not hardware.has_faiss:
        return Choice(exact, place, f"FAISS is not installed, so the search is exact ({reckoned})")
    bytes_needed = 4 * n * n_dimensions
    if bytes_needed > _MEMORY_SHARE * hardware.memory_bytes:
        why = f"{bytes_needed / 1e9:.1f} GB of vectors are more than half of the memory"
        return Choice("disk", "cpu", why)
    return Choice(
        "ivf", _device("ivf", device, hardware), f"exact search would take long ({reckoned})"
    )


def check_names(kind: Kind | Literal["auto"], device: Device | Literal["auto"]) -> None:
    """Refuse kinds and devices that there are nowhere."""
    if kind not in (*KINDS, "auto"):
        raise ConfigError(
            "there is no such index", found=kind, expected=" or ".join((*KINDS, "auto"))
        )
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError("there is no such device", found=device, expected="auto, cpu or cuda")


def _device(kind: Kind, device: Device | Literal["auto"], hardware: Hardware) -> Device:
    if kind != "exact" and not hardware.has_faiss:
        raise ConfigError(
            f"an index of kind {kind!r} needs FAISS, which is not installed",
            do="install faiss-cpu or faiss-gpu (never both), or take the kind 'exact'",
        )
    gpus = hardware.torch_gpus if kind == "exact" else hardware.faiss_gpus
    able = kind in ("exact", "flat", "ivf")
    if device == "cuda" and not (able and gpus):
        raise ConfigError(
            f"an index of kind {kind!r} cannot be searched on a GPU here",
            found=f"{hardware.torch_gpus} GPUs for torch, {hardware.faiss_gpus} for FAISS",
            expected="a GPU, and one of exact, flat (faiss-gpu) and ivf (faiss-gpu)",
        )
    return "cuda" if able and gpus and device != "cpu" else "cpu"
