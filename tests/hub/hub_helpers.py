"""Packages as a forger would make them: archives of any entries, and parts declared anew."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from atlas import files


def made_up(seed: int) -> AnnData:
    """300 cells of four types, each six times higher in ten of 60 genes, in two batches."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(0, 4, 300), rng.integers(0, 2, 300)
    rate = np.random.default_rng(0).gamma(1.0, size=60)
    rate = rate * np.where(np.arange(60) // 10 == kind[:, None], 6, 1)
    rate *= np.where(np.arange(60) % 7 == (seed + 3 * batch[:, None]) % 7, 2, 1)
    rate *= 240 / rate.sum(axis=1, keepdims=True)
    label = np.array([f"type_{i + 1}" for i in range(4)], object)[kind]
    label[rng.random(300) < 0.1] = "Unknown"
    obs = pd.DataFrame(
        {"cell_type": label, "batch": [f"batch_{i + 1}" for i in batch]},
        index=[f"barcode{seed}_{i}" for i in range(300)],
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(60)])
    return AnnData(rng.poisson(rate).astype(np.float32), obs=obs, var=var)


def members(package: Path) -> list[tuple[str, bytes]]:
    """Name and content of each file, ``package.json`` first."""
    declared = json.loads((package / "package.json").read_bytes())["parts"]
    return [(name, (package / name).read_bytes()) for name in ("package.json", *declared)]


def declare(package: Path) -> None:
    """Make ``package.json`` and ``model.json`` declare what the files are now, as a forger does."""
    model = package / "model" / "model.json"
    weights = (package / "model" / "weights.safetensors").read_bytes()
    about = json.loads(model.read_bytes())
    if isinstance(about, dict):
        about["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        model.write_text(json.dumps(about))
    path = package / "package.json"
    manifest = json.loads(path.read_bytes())
    for name, part in manifest["parts"].items():
        data = (package / name).read_bytes()
        part["bytes"], part["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))


def flipped(archive: bytes) -> bytes:
    """With one byte changed in the middle."""
    middle = len(archive) // 2
    return archive[:middle] + bytes([archive[middle] ^ 0x55]) + archive[middle + 1 :]


def tar(entries: Iterable[tuple[tarfile.TarInfo | str, bytes]], **options: Any) -> bytes:
    """A ``.tar.gz`` of any entries."""
    out = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", **options) as archive,
    ):
        for about, data in entries:
            if isinstance(about, str):
                about = tarfile.TarInfo(about)
            if about.isreg():
                about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A link, device or pipe."""
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, target
    return about


def zipped(entries: Iterable[tuple[zipfile.ZipInfo | str, bytes]]) -> bytes:
    """A ``.zip`` of any entries."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for about, data in entries:
            archive.writestr(about, data)
    return out.getvalue()


def zip_special(name: str, mode: int) -> zipfile.ZipInfo:
    """An entry of a mode of its own."""
    about = zipfile.ZipInfo(name)
    about.create_system, about.external_attr = 3, mode << 16
    return about


class Server:
    """A web server on loopback whose answers are given by a function."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                answer(self)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # clients that gave up

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def serve(handler: BaseHTTPRequestHandler, data: bytes, length: int | None = None) -> None:
    """Answer with bytes."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


class Failing:
    """Lets n calls pass; the next one fails as a full disk or Ctrl-C does."""

    def __init__(self, real: Callable[..., Any], left: list[int], error: BaseException) -> None:
        self.real, self.left, self.error = real, left, error

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise self.error
        return self.real(*arguments, **options)


def failing(patch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
    """Make the n-th write from now on fail."""
    left = [n]
    for name in ("write_bytes", "write_pieces", "sync_folder"):
        patch.setattr(files, name, Failing(getattr(files, name), left, error))
