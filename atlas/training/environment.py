"""What a training computes with: versions, processor, device and threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from atlas.errors import CheckpointError, ConfigError
from atlas.models.threads import heavy_threads, threads


@dataclass(frozen=True, slots=True)
class Environment:
    """What the numbers of a training depend on besides its configuration.

    Attributes
    ----------
    torch, numpy, atlas, python
        Versions.
    processor
        The vector instructions that torch uses, or the name of the CUDA device.
    device
        ``"cpu"`` or ``"cuda"``.
    threads
        Threads of torch, in each process.
    ranks
        Processes that train together.
    """

    torch: str
    numpy: str
    atlas: str
    python: str
    processor: str
    device: str
    threads: int
    ranks: int = 1


def current_environment(device: torch.device, ranks: int = 1) -> Environment:
    """What this process computes with, on a device and with the threads in force."""
    on_cuda = device.type == "cuda"
    return Environment(
        torch=torch.__version__,
        numpy=np.__version__,
        atlas=_atlas_version(),
        python=platform.python_version(),
        processor=torch.cuda.get_device_name(device)
        if on_cuda
        else torch.backends.cpu.get_cpu_capability(),
        device=device.type,
        threads=heavy_threads(),
        ranks=ranks,
    )


def resolve_device(name: str) -> torch.device:
    """The device that a configuration names; ``"auto"`` takes CUDA where there is one.

    Raises
    ------
    ConfigError
        The name is none of a CPU or CUDA device, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            "device is not offered", found=repr(name), expected="auto, cpu, cuda or cuda:<number>"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            "There is no such CUDA device",
            found=f"{torch.cuda.device_count()} devices, {name!r} asked for",
            do="choose --device cpu, or install a torch with CUDA",
        )
    return device


def check_precision(precision: str, device: torch.device) -> None:
    """Warn where bfloat16 is slower than float32."""
    if precision == "bfloat16" and device.type == "cpu" and not _has_bfloat16():
        warnings.warn(
            "This processor has no instructions for bfloat16: steps in it take several times as "
            "long as in float32. Leave out --precision bfloat16",
            stacklevel=2,
        )


def check_environment(
    recorded: Environment, device: torch.device, path: Path, ranks: int = 1
) -> None:
    """Refuse another kind of device; warn where equality bit for bit cannot be kept.

    Another version of torch is a warning and not a refusal: the training stays a valid one, and a
    run of days should outlive an upgrade.

    Raises
    ------
    CheckpointError
        The run was on a CPU and would go on on CUDA, or the reverse: the generators differ.
    """
    current = current_environment(device, ranks)
    if current.device != recorded.device:
        raise CheckpointError(
            "The run was started on another kind of device",
            found=f"{recorded.device} in the checkpoint, {current.device} now",
            do=f"resume with --device {recorded.device}, or train anew into another folder",
            path=path,
        )
    changed = [
        f"{name} {old} → {new}"
        for name in ("torch", "processor", "ranks")
        if (old := getattr(recorded, name)) != (new := getattr(current, name))
    ]
    if changed:
        warnings.warn(
            f"Resumed with {', '.join(changed)}: training goes on, but its numbers may differ in "
            "the last digits from those of an uninterrupted run",
            stacklevel=2,
        )


_VALUES_A_THREAD = 2**20
"""Cells × genes for which another thread of torch's pays (bench_million in benchmarks/LOG.md)."""


@contextmanager
def torch_threads(asked: int, recorded: int | None, path: Path, n_values: int) -> Iterator[None]:
    """Give a training its number of threads, and torch's operations theirs.

    Parameters
    ----------
    asked
        The configuration's; 0 leaves it to the checkpoint, and without one to torch's own setting.
    recorded
        Threads of the run that is resumed; None for a new run.
    n_values
        Cells × genes of a step. Torch's operations have a thread for each 2^20 of them at most:
        threads that share a small operation wait for each other. See :func:`threads` for the rest.
    path
        The run folder, for errors.

    Raises
    ------
    CheckpointError
        The run had another number of threads than asked for, or than this machine has.
    """
    before = torch.get_num_threads()
    wanted = asked or recorded or before
    if recorded is not None and wanted != recorded:
        raise CheckpointError(
            "The run had another number of threads, and sums would be taken in another order",
            found=f"{recorded} in the checkpoint, {wanted} asked for",
            do=f"resume with --threads {recorded}, or without --threads",
            path=path,
        )
    available = os.cpu_count() or 1
    of_torch = min(wanted, -(-n_values // _VALUES_A_THREAD))
    if recorded is not None and of_torch > max(available, before):
        raise CheckpointError(
            "The run had more threads than this machine has, and sums would be taken in another "
            "order",
            found=f"{of_torch} for a step of the checkpoint, {available} processors here",
            do=f"resume on a machine with {of_torch} processors, or train anew into another folder",
            path=path,
        )
    with threads(of_torch, heavy=wanted):
        yield


def _has_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 by instructions of the processor; True if it cannot say."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is None or bool(ask())


def _atlas_version() -> str:
    try:
        return importlib.metadata.version("atlas-trainer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
