"""How fast do shuffled minibatches come from a web server, beside zarr-python over obstore?

The server is on this machine and waits before each answer, as one across a network does. Both sides
read the same study of the same store in blocks of 256 rows, mix 16,384 rows, and give minibatches
of 4,096; the peer reads as many blocks at a time as we make requests.
"""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import (
    Json,
    Phases,
    argument_parser,
    provenance,
    run_worker,
    say,
    say_provenance,
    serve_worker,
    table,
    write_json,
)

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

_BLOCK, _MIXED, _MINIBATCH = 256, 16_384, 4096
_AT_A_TIME = 16
_WAITS = (0.005, 0.03)
"""Seconds before an answer: in a data centre, and across a region."""


def serve(folder: str, wait: float) -> None:
    """A web server with ranges, until it is killed; prints its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            time.sleep(wait)
            path = Path(folder) / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            start, stop, status = 0, size, 200
            if asked := self.headers["Range"]:
                status = 206
                low, _, high = asked.removeprefix("bytes=").partition("-")
                start = int(low) if low else max(0, size - int(high))
                stop = min(size, int(high) + 1) if low and high else size
            self.send_response(status)
            self.send_header("ETag", f'"{size}"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if self.command == "GET":
                with path.open("rb") as file:
                    self.connection.sendfile(file, start, stop - start)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def make_store(arguments: Json, phases: Phases) -> Json:
    """A store of simulated cells, with the list of its files."""
    from cells import cells_file

    import atlas
    from atlas.store import write_inventory

    folder = Path(arguments["folder"])
    file = cells_file(folder, arguments["cells"], arguments["genes"], arguments["nnz"])
    root = folder / "remote.atlas"
    if not root.exists():
        atlas.create_store(root).append(file, study="cells", profile="portable")
    write_inventory(root)
    return {}


def ours(arguments: Json, phases: Phases) -> Json:
    """Two epochs: counts come from the server, then from the cache."""
    import atlas
    from atlas.codecs.remote import remote_of
    from loaders import MinibatchLoader

    shutil.rmtree(arguments["cache"], ignore_errors=True)
    store = atlas.open_store(arguments["url"], cache_folder=arguments["cache"])
    remote = remote_of(store.path / "manifests")
    loader = MinibatchLoader(store, _MINIBATCH, block_size=_BLOCK, buffer_size=_MIXED)
    phases.begin("work")
    out: Json = {}
    for name in ("first", "second"):
        total, started = 0.0, time.perf_counter()
        for minibatch in loader:
            total += float(minibatch.data.sum())
        out[name] = store.n_obs / (time.perf_counter() - started)
        out["total"] = total
    phases.begin("rest")
    assert remote is not None
    return out | {"requests": remote.requests, "bytes": remote.received}


def zarr_python(arguments: Json, phases: Phases) -> Json:
    """One epoch of the same rows through zarr-python's store for obstore."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import scipy.sparse as sp
    import zarr
    from obstore.store import HTTPStore
    from zarr.storage import ObjectStore

    url = f"{arguments['url']}/studies/cells"
    store = ObjectStore(HTTPStore.from_url(url, client_options={"allow_http": True}))
    group = zarr.open_group(store, mode="r", path="X", use_consolidated=False)
    indptr, indices, data = (group[name] for name in ("indptr", "indices", "data"))
    bounds = indptr[:]
    n_obs, n_vars = (int(n) for n in group.attrs["shape"])
    rng = np.random.default_rng(0)
    blocks = rng.permutation(np.arange(0, n_obs, _BLOCK))
    phases.begin("work")
    started = time.perf_counter()

    def read(first: int) -> sp.csr_matrix:
        last = min(n_obs, first + _BLOCK)
        a, b = int(bounds[first]), int(bounds[last])
        values = data[a:b].astype(np.float32), indices[a:b].astype(np.int32)
        return sp.csr_matrix((*values, bounds[first : last + 1] - a), (last - first, n_vars))

    def minibatches() -> Iterator[sp.csr_matrix]:
        with ThreadPoolExecutor(_AT_A_TIME) as workers:
            for k in range(0, len(blocks), _MIXED // _BLOCK):
                mixed = sp.vstack(list(workers.map(read, blocks[k : k + _MIXED // _BLOCK])), "csr")
                order = rng.permutation(mixed.shape[0])
                for i in range(0, len(order), _MINIBATCH):
                    yield mixed[order[i : i + _MINIBATCH]]

    total = sum(float(minibatch.data.sum()) for minibatch in minibatches())
    seconds = time.perf_counter() - started
    phases.begin("rest")
    return {"first": n_obs / seconds, "total": total}


def measure(work: Path, wait: float) -> Json:
    """All sides, one server each."""
    out: Json = {"wait": wait}
    for side in ("ours", "zarr_python"):
        command = [sys.executable, __file__, "--serve", str(work), str(wait)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        try:
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}/remote.atlas"
            asked = {"url": url, "cache": str(work / "cache")}
            outcome = run_worker(__file__, side, asked, work)
        finally:
            server.kill()
            server.wait()
        out[side] = outcome.result | {"memory_bytes": outcome.peak_above("work", "work")}
    if abs(out["ours"]["total"] - out["zarr_python"]["total"]) > 1e-6 * out["ours"]["total"]:
        raise RuntimeError(f"the counts differ: {out}")
    out["ratio"] = out["ours"]["first"] / out["zarr_python"]["first"]
    return out


def main() -> None:
    args = argument_parser(__doc__ or "").parse_args()
    known = provenance()
    say_provenance(known)
    shape = {"cells": 600, "genes": 500, "nnz": 1000} if args.tiny else {}
    shape = shape or {"cells": 100_000, "genes": 20_000, "nnz": 1900}
    with tempfile.TemporaryDirectory(prefix="bench-remote-", dir=args.work) as temporary:
        work = args.work / f"remote-{shape['cells']}" if args.work else Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        run_worker(__file__, "make_store", shape | {"folder": str(work)}, work)
        found = [measure(work, wait) for wait in (_WAITS[:1] if args.tiny else _WAITS)]
    header = ["wait", "ours, first epoch", "from the cache", "zarr-python", "ratio", "memory"]
    rows = [
        [
            f"{1000 * one['wait']:g} ms",
            f"{one['ours']['first']:,.0f} cells/s",
            f"{one['ours']['second']:,.0f}",
            f"{one['zarr_python']['first']:,.0f}",
            f"{one['ratio']:.1f}",
            " / ".join(f"{one[s]['memory_bytes'] / 1e6:,.0f} MB" for s in ("ours", "zarr_python")),
        ]
        for one in found
    ]
    say(table(header, rows))
    one = found[0]["ours"]
    say(f"{one['requests']:,} requests, {one['bytes'] / 1e6:,.1f} MB of chunks")
    write_json(args.json, {"benchmark": "remote", **known, "shape": shape, "waits": found})


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], float(sys.argv[3]))
    serve_worker([make_store, ours, zarr_python])
    main()
