"""The commands of the README, and what they say to bad input: one clear error, code 2, no trace."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from atlas.cli import main
from atlas.cli.parser import build_parser
from atlas.store import open_store

MakeStudy = Callable[..., AnnData]


@pytest.fixture
def file(tmp_path: Path, make_study: MakeStudy) -> Path:
    path = tmp_path / "one.h5ad"
    make_study(n=200).write_h5ad(path)
    return path


def _tenx(path: Path) -> Path:
    """A Cell Ranger 3 file of 50 cells, with two antibodies beside the genes."""
    counts = sp.random(32, 50, density=0.3, random_state=1, format="csc")
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = np.array([f"AAAC{i}-1" for i in range(50)], "S")
        matrix["data"] = np.ceil(counts.data * 5).astype(np.int32)
        matrix["indices"] = counts.indices.astype(np.int64)
        matrix["indptr"] = counts.indptr.astype(np.int64)
        matrix["shape"] = np.array([32, 50], np.int32)
        features = matrix.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(30)] + ["ab1", "ab2"], "S")
        features["name"] = np.array([f"gene{i}" for i in range(30)] + ["CD3", "CD4"], "S")
        kinds = ["Gene Expression"] * 30 + ["Antibody Capture"] * 2
        features["feature_type"] = np.array(kinds, "S")
        features["genome"] = np.array(["GRCh38"] * 32, "S")
    return path


def test_the_commands_of_the_readme(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, run = str(tmp_path / "pbmc.atlas"), str(tmp_path / "runs" / "scvi")
    tenx = _tenx(tmp_path / "filtered_feature_bc_matrix.h5")

    def atlas(*arguments: str) -> str:
        assert main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    keys = ("--batch-key", "batch", "--label-key", "cell_type")
    assert "zheng: 200 cells" in atlas("ingest", store, str(file), "--study", "zheng", *keys)
    assert "Antibody Capture" in atlas("ingest", store, str(tenx), "--study", "donor7")
    assert "30 genes" in atlas("info", store)
    info = json.loads(atlas("info", store, "--json"))
    assert (info["n_obs"], info["n_vars"]) == (250, 30)
    assert [study["name"] for study in info["studies"]] == ["zheng", "donor7"]
    assert "20 genes chosen" in atlas("genes", store, "--n", "20")
    options = ["train", store, "--model", "scvi", "--out", run, "--epochs", "2", "--seed", "0"]
    options += ["--n-layers", "1", "--n-hidden", "8", "--gene-likelihood", "nb"]
    assert "trained 2 epochs" in atlas(*options, "--resume")  # on an empty folder it starts
    before = (tmp_path / "runs/scvi/weights.safetensors").read_bytes()
    assert "trained 2 epochs" in atlas(*options, "--resume")
    assert (tmp_path / "runs/scvi/weights.safetensors").read_bytes() == before
    assert "250 cells × 10 dimensions" in atlas("embed", run, store, "--name", "scvi")
    metrics = tmp_path / "metrics.json"
    atlas("evaluate", store, "--embedding", "scvi", "--json", str(metrics))
    assert json.loads(metrics.read_text())["measures"]
    report = tmp_path / "report.html"
    assert str(report) in atlas("report", store, "--embedding", "scvi", "--out", str(report))
    out = tmp_path / "out.h5ad"
    atlas("export", store, "--embedding", "scvi", "--rows", "atlas_study=donor7", str(out))
    exported = anndata.read_h5ad(out)
    assert exported.shape == (50, 30)
    assert exported.obsm["X_scvi"].shape == (50, 10)
    assert (
        atlas("simulate", str(tmp_path / "sim"), "--cells", "60", "--genes", "40").count("\n") == 3
    )


def test_help_says_what_an_option_is_for_every_model_that_takes_it() -> None:
    (commands,) = (a for a in build_parser()._actions if a.choices)
    told = {name: " ".join(sub.format_help().split()) for name, sub in commands.choices.items()}
    for name, sub in commands.choices.items():
        assert not re.search(r"default: (None|\[\])?\)", told[name]), name
        for action in sub._actions:
            assert "--device" not in action.option_strings or "cuda" in action.help, name
    train = told["train"]
    assert (
        "scvi, scanvi: Dropout in the encoder (0.1). trvae, cvae: Dropout in encoder and" in train
    )
    assert 'scvi, scanvi: "zinb", "nb" or "poisson" (zinb). trvae, cvae: "nb" or "zinb"' in train
    assert '"gaussian" of normalised expression' in train
    assert "davae: BatchNorm (the paper)" in train
    assert "decoder (scvi, scanvi, trvae, cvae: 2)" in train  # said once where it is the same
    assert "(default: 0.001)" in train


def _damaged(tmp_path: Path, make_study: MakeStudy, kind: str) -> Path:
    path = tmp_path / "bad.h5ad"
    adata = make_study()
    if kind == "normalised":
        adata.layers["counts"] = adata.X.copy()
        adata.X = adata.X * 0.37
    elif kind == "negative":
        adata.X.data[3] = -1
    elif kind == "not finite":
        adata.X.data[3] = np.nan
    elif kind == "row names":
        adata.obs_names = ["cell0", *adata.obs_names[:-1]]
    elif kind == "other genes":
        adata.var_names = [f"other{i}" for i in range(30)]
    adata.write_h5ad(path)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "text":
        path.write_text("barcode,gene\n")
    elif kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("normalised", [], ["holds fractions", "raw counts", "--layer counts"]),
        ("negative", [], ["negative", "value -1"]),
        ("not finite", [], ["not finite", "nan"]),
        ("row names", [], ["not unique", "cell0"]),
        ("empty", [], ["is empty", "0 bytes"]),
        ("truncated", [], ["damaged"]),
        ("text", [], ["not an HDF5 file"]),
        ("missing", [], ["does not exist"]),
        ("fine", ["--batch-key", "donor"], ["'donor'", "one of batch, lane, cell_type, score"]),
        ("fine", ["--label-key", "type"], ["'type'", "one of batch, lane, cell_type, score"]),
        ("fine", ["--layer", "counts"], ["layer", "counts"]),
        ("fine", ["--use-raw"], ["raw"]),
        ("fine", ["--study", "a/b"], ["cannot have this name"]),
    ],
)
def test_bad_input_is_one_error_with_code_2_and_leaves_nothing(
    tmp_path: Path,
    file: Path,
    make_study: MakeStudy,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    options: list[str],
    words: list[str],
    fresh: bool,
) -> None:
    path = _damaged(tmp_path, make_study, kind)
    store = tmp_path / "s.atlas"
    if not fresh:
        assert main(["ingest", str(store), str(file), "--study", "one"]) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["ingest", str(store), str(path), "--study", "two", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("atlas: ") == 1
    assert "Traceback" not in error
    for word in [*words, *(["path: "] if "cannot have" not in words[0] else [])]:
        assert word in error, error
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before
    assert store.exists() != fresh


def test_other_wrong_ways(
    tmp_path: Path, file: Path, make_study: MakeStudy, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "s.atlas")
    assert main(["ingest", store, str(file), "--study", "one"]) == 0

    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        return capsys.readouterr().err

    assert "in the store already" in refused("ingest", store, str(file), "--study", "one")
    other = _damaged(tmp_path, make_study, "other genes")
    assert "other0" in refused("ingest", store, str(other), "--study", "two")
    assert "This is no store" in refused("info", str(file))
    assert "There is no store here" in refused("info", str(tmp_path / "nowhere"))
    assert "No genes are chosen" in refused("train", store, "--out", str(tmp_path / "run"))
    assert "at least 1" in refused("genes", store, "--n", "0")
    assert main(["genes", store, "--n", "10"]) == 0
    run = ("train", store, "--out", str(tmp_path / "run"))
    assert "n_layers is out of range" in refused(*run, "--n-layers", "0")
    blocks = ("--block-size", "1", "--buffer-size", "1")
    assert "buffer_size is too small" in refused(*run, *blocks)
    assert "no such embedding" in refused("evaluate", store, "--embedding", "scvi")
    assert "no such folder" in refused("embed", str(tmp_path / "nowhere"), store)
    assert not (tmp_path / "run").exists()
    assert "could not be written" in refused("export", store, str(tmp_path / "no" / "out.h5ad"))
    with pytest.raises(SystemExit) as leaving:
        main(["train", store, "--out", "x", "--n-layers", "many"])
    assert leaving.value.code == 2


@pytest.mark.parametrize("limit", [0, 2_000, 20_000])
def test_an_export_to_a_full_disk_leaves_nothing_and_exits_in_order(
    tmp_path: Path, make_study: MakeStudy, limit: int
) -> None:
    """In a process of its own: HDF5 that could not write used to crash when the process ended."""
    store, out = tmp_path / "s.atlas", tmp_path / "out.h5ad"
    make_study(n=400, genes=200).write_h5ad(tmp_path / "one.h5ad")
    assert main(["ingest", str(store), str(tmp_path / "one.h5ad"), "--study", "one"]) == 0
    script = f"""
import resource, signal, sys
from atlas.cli import main
from atlas.cli.parser import build_parser
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
sys.exit(main(["export", {str(store)!r}, {str(out)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done
    assert "could not be written\n  found: [Errno 27] File too large" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.h5ad", "s.atlas"]


def _train(store: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "atlas", "train", str(store), "--out", str(run), "--resume"]
    command += ["--epochs", "4", "--checkpoint-steps", "5", "--threads", "1", "--n-hidden", "32"]
    return subprocess.Popen(
        command, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )


@pytest.mark.long
def test_a_killed_and_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, make_study: MakeStudy
) -> None:
    store = tmp_path / "s.atlas"
    make_study(n=3000, genes=60).write_h5ad(tmp_path / "one.h5ad")
    arguments = ["--study", "one", "--batch-key", "batch"]
    assert main(["ingest", str(store), str(tmp_path / "one.h5ad"), *arguments]) == 0
    assert main(["genes", str(store), "--n", "50"]) == 0
    straight = _train(store, tmp_path / "straight")
    assert straight.wait() == 0, straight.stderr
    rng = np.random.default_rng(3)
    run, killed = tmp_path / "killed", 0
    while True:
        process = _train(store, run)
        checkpoints = run / "checkpoints"
        seen = set(checkpoints.iterdir()) if checkpoints.is_dir() else set()
        # wait until it has made progress, then a random while
        while process.poll() is None and killed < 5:
            now = set(checkpoints.iterdir()) if checkpoints.is_dir() else set()
            if now - seen:
                time.sleep(rng.uniform(0, 0.3))
                break
            time.sleep(0.02)
        if killed < 5 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
            process.communicate()
            continue
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        break
    assert killed >= 2
    for name in ["weights.safetensors"]:
        assert (run / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    mine = sorted(p.relative_to(run) for p in run.rglob("*.safetensors"))
    theirs = sorted(
        p.relative_to(tmp_path / "straight") for p in (tmp_path / "straight").rglob("*.safetensors")
    )
    assert [p.name for p in mine] == [p.name for p in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert (run / one).read_bytes() == (tmp_path / "straight" / other).read_bytes(), one


def test_a_flipped_chunk_stops_training_with_its_path(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.atlas"
    assert main(["ingest", str(store), str(file), "--study", "one"]) == 0
    assert main(["genes", str(store), "--n", "10"]) == 0
    shard = store / "studies/one/X/data/c/0"
    content = bytearray(shard.read_bytes())
    content[30] ^= 4
    shard.write_bytes(content)
    assert main(["train", str(store), "--out", str(tmp_path / "run"), "--epochs", "1"]) == 2
    assert f"path: {shard}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert open_store(store).n_obs == 200
