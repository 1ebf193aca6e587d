"""The loader's benchmarks run, and what they write is whole and sane; speed is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PEERS = Path(os.environ.get("ATLAS_PEERS", Path.home() / ".cache" / "atlas-peers"))
OURS = [
    "ours, block 32",
    "ours",
    "ours, narrow",
    "ours, weighted",
    "ours, chosen genes",
    "ours, projected",
    "ours, TileDB",
    "sparse TileDB",
    "ours, SOMA",
    "ours, SOMA, block 2048",
    "ours, h5ad",
    "ours, AnnData in Zarr",
]
THEIRS = ["annbatch", "scDataset", "tiledbsoma-ml"]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)


@pytest.fixture(scope="module")
def contract():
    sys.path.insert(0, str(BENCHMARKS / "peers"))
    import contract

    yield contract
    sys.path.remove(str(BENCHMARKS / "peers"))


def run(script: str, folder: Path, *options: str) -> tuple[dict, str]:
    out = folder / "figures.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--tiny", "--json", str(out), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text()), done.stdout


def sides_of(figures: dict) -> dict[str, dict]:
    (size,) = figures["sizes"]
    (minibatches,) = size["rounds"]
    return {row["side"]: row for row in minibatches["sides"]}


def assert_measured(row: dict) -> None:
    assert row["skipped"] is None, row["skipped"]
    assert row["cells_a_second"] > 0
    assert row["memory_bytes"] > 0
    assert not row["same_cells"].startswith("NO"), row["same_cells"]


@pytest.mark.long
def test_all_of_ours_yield_the_cells_and_a_missing_peer_is_said(tmp_path):
    figures, printed = run("bench_loader.py", tmp_path, "--peers", str(tmp_path / "none"))
    rows = sides_of(figures)
    assert list(rows) == OURS + THEIRS
    for name in OURS:
        assert_measured(rows[name])
        whole = "600 rows, all in the file" if name == "ours, weighted" else "every row once"
        assert rows[name]["same_cells"] == whole
    # 600 rows are 19 minibatches: near an ideal shuffle's, but not within 2 %
    assert rows["ours"]["runs"][0]["diversity"] == pytest.approx(1, abs=0.1)
    assert rows["ours, weighted"]["runs"][0]["diversity"] is None
    assert rows["ours"]["runs"][0]["types"][:2] == ["float32", "int32"]
    assert rows["ours, narrow"]["runs"][0]["types"][:2] == ["uint16", "uint16"]
    for name in THEIRS:
        assert "no environment" in rows[name]["skipped"]
        assert rows[name]["runs"] == []
    assert printed.count("benchmarks/peers/setup") == len(THEIRS)
    targets = [ratio["what"] for ratio in figures["sizes"][0]["rounds"][0]["ratios"]]
    assert "ours, projected / ours" in targets
    assert "ours, weighted / ours" in targets


@pytest.mark.long
@pytest.mark.parametrize(
    ("side", "folder"),
    [("annbatch", "annbatch"), ("scDataset", "scdataset"), ("tiledbsoma-ml", "tiledbsoma")],
)
def test_peers_yield_the_same_cells(tmp_path, side, folder):
    if not (PEERS / folder / "whole").exists():
        pytest.skip(f"no environment in {PEERS / folder}: make it by benchmarks/peers/setup")
    figures, _ = run("bench_loader.py", tmp_path, "--peers", str(PEERS), "--sides", side)
    rows = sides_of(figures)
    assert_measured(rows[side])
    assert rows[side]["same_cells"] == "every row once"
    assert rows[side]["runs"][0]["versions"]


def test_bound_has_every_step(tmp_path):
    figures, printed = run("bench_decode.py", tmp_path)
    steps = figures["step_seconds"]
    assert list(steps)[:6] == [
        "read",
        "checksum",
        "decompress",
        "sum",
        "gather",
        "gather and widen",
    ]
    assert all(seconds > 0 for seconds in steps.values())
    assert steps["all, narrow"] == pytest.approx(
        sum(steps[name] for name in ("read", "checksum", "decompress", "sum", "gather"))
    )
    assert figures["cells"] == 400
    assert [row["output"] for row in figures["loader"]] == ["all, narrow", "all, widened"]
    for row in figures["loader"]:
        assert "failed" not in row, row["failed"]
        assert row["share"] > 0
    assert len(figures["layouts"]) == 14
    assert "share" in printed


def test_fingerprint_sees_counts_and_columns_but_not_their_order(contract):
    data = np.array([3, 1, 2, 5], np.float32)
    indices = np.array([0, 4, 2, 9], np.int32)
    indptr = np.array([0, 2, 2, 4])
    whole = contract.fingerprints((data, indices, indptr))
    assert whole[1] == 0  # a cell without counts
    narrow = data.astype(np.uint16), indices.astype(np.uint16), indptr
    assert contract.fingerprints(narrow).tolist() == whole.tolist()

    turned = [1, 0, 3, 2]
    assert contract.fingerprints((data[turned], indices[turned], indptr)).tolist() == whole.tolist()
    other = data.copy()
    other[0] += 1
    assert contract.fingerprints((other, indices, indptr))[0] != whole[0]
    swapped = indices[[1, 0, 2, 3]]
    assert contract.fingerprints((data, swapped, indptr))[0] != whole[0]


def test_fingerprints_do_not_depend_on_where_minibatches_end(contract):
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 9, 1000)
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    data = rng.integers(1, 50, indptr[-1]).astype(np.float32)
    indices = rng.integers(0, 20_000, indptr[-1]).astype(np.int32)
    whole = contract.fingerprints((data, indices, indptr))
    parts = [
        contract.fingerprints(
            (
                data[indptr[a] : indptr[b]],
                indices[indptr[a] : indptr[b]],
                indptr[a : b + 1] - indptr[a],
            )
        )
        for a, b in ((0, 300), (300, 301), (301, 1000))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.long
def test_remote_compares_both_on_the_same_counts(tmp_path):
    pytest.importorskip("obstore", reason="the extra remote is not installed")
    figures, printed = run("bench_remote.py", tmp_path)
    (found,) = figures["waits"]
    assert found["ours"]["total"] == pytest.approx(found["zarr_python"]["total"])
    assert found["ratio"] == pytest.approx(found["ours"]["first"] / found["zarr_python"]["first"])
    assert found["ours"]["requests"] > 0
    assert "zarr-python" in printed


@pytest.mark.long
def test_formats_compares_both_on_the_same_counts(tmp_path):
    figures, printed = run("bench_formats.py", tmp_path)
    formats = ["h5ad", "zarr", "mtx", "loom", "csv", "soma"]
    assert [one["format"] for one in figures["formats"]] == formats
    for one in figures["formats"]:
        (ours,), (theirs,) = one["ours"], one["theirs"]
        assert ours["total"] == pytest.approx(theirs["total"])
        assert one["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
        assert one["peer"] in printed
