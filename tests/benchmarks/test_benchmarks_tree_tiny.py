"""bench_tree runs, and its measures are those of probabilities and trees that are known."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from atlas.simulate import draw_tree

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    import bench_tree

    yield bench_tree
    sys.path.remove(str(BENCHMARKS))


def test_a_latent_space_that_is_the_tree_is_told_from_noise(bench: ModuleType) -> None:
    tree = draw_tree(4, 0)
    state = np.random.default_rng(0).integers(len(tree.state_depth), size=2000)
    distance = tree.state_distance[state]
    noise = np.random.default_rng(1).normal(size=(2000, 10)).astype(np.float32)
    assert bench.nearness(distance.astype(np.float32), distance) < 0.05
    assert bench.nearness(noise, distance) == pytest.approx(1, abs=0.05)


def test_probabilities_that_fall_along_all_paths(bench: ModuleType) -> None:
    tree = draw_tree(4, 1)
    distance = tree.state_distance
    ways = bench.paths(distance)
    assert len(ways) == 5 * 4
    for end, states in ways:  # whole branches, all the way
        branches, sizes = np.unique(tree.state_branch[states], return_counts=True)
        assert (sizes == 32).all()
        lengths = tree.length[1:][branches].sum()
        assert np.ptp(distance[states, end]) == pytest.approx(lengths, abs=0.06)
    falls, rises = np.exp(-distance), np.exp(distance)
    np.testing.assert_allclose(bench.along_paths(falls, distance, ways), 1)
    np.testing.assert_allclose(bench.along_paths(rises, distance, ways), -1)
    np.testing.assert_array_equal(bench.along_paths(falls * 0, distance, ways), 0)
    assert (np.diff(bench.profile(falls, ways), axis=1) < 0).all()
    assert bench.profile(rises, ways).shape == (20, bench.BINS)


@pytest.mark.long
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)
def test_it_measures_all_sides_on_the_same_cells(tmp_path: Path) -> None:
    pytest.importorskip("scvi", reason="the peer is not installed; it is in the extra `bench`")
    out = tmp_path / "figures.json"
    sides = ["PCA, kNN", "scANVI, from scVI", "scvi-tools SCANVI"]
    command = [sys.executable, str(BENCHMARKS / "bench_tree.py"), "--tiny", "--json", str(out)]
    done = subprocess.run(
        [*command, "--sides", *sides], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads(out.read_text())
    (cells,) = content["cells"]
    assert 0 < cells["n_labelled"] < cells["n_cells"] == 300
    assert list(content["results"]) == sides
    for side in sides:
        (found,) = content["results"][side]
        assert found["ends"] == ["root", "tip_1", "tip_2", "tip_3"]
        for measure in ("along_paths", "of_all"):
            assert len(found[measure]) == 4
            assert np.abs(found[measure]).max() <= 1
        profile = np.array(found["profile"])
        assert profile.shape == (4 * 3, 9)
        assert ((profile >= 0) & (profile <= 1)).all()
        assert side in done.stdout
    # PCA finds a tree in which almost all genes vary, however few cells and genes there are
    assert np.mean(content["results"]["PCA, kNN"][0]["along_paths"]) > 0.3
