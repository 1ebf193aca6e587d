"""Errors of an update's steps, told by the atlas's own paths and by options that an update has."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from living_helpers import KEYS, train_small, update
from workflows_helpers import study as make_study

import atlas
from atlas.cli.parser import build_parser
from atlas.config import TrainConfig
from atlas.errors import (
    AtlasError,
    CheckpointError,
    ConfigError,
    CorruptStoreError,
    ModelError,
    StoreError,
    TrainingError,
)
from atlas.evaluation.calibration import leave_out
from atlas.evaluation.codes import Categories
from atlas.models import LabelTree
from atlas.models.layers import BatchNorm
from atlas.models.surgery import check_reference
from atlas.store.arrays import checked_folder
from atlas.store.fork import fork
from atlas.store.schema import Part
from atlas.training.environment import check_environment, current_environment, torch_threads
from atlas.training.inputs import CellColumns
from atlas.training.loading import training_loader
from atlas.training.ranks import Ranks
from atlas.training.run import check_same_run, open_run
from atlas.training.writing import io_errors
from atlas.workflows import labelling, living
from atlas.workflows.indexing import stored_index
from atlas.workflows.update_errors import told_of_the_atlas


def options_of_update() -> set[str]:
    commands = next(a for a in build_parser()._actions if isinstance(a.choices, dict))
    assert isinstance(commands.choices, dict)
    update: argparse.ArgumentParser = commands.choices["update"]
    return {option for action in update._actions for option in action.option_strings}


def check_words(error: AtlasError, store: Path) -> str:
    """It names no option that an update lacks, but within a command, and no path of a fork."""
    text = str(error)
    outside = re.sub(r"`[^`]*`", "", text)
    assert set(re.findall(r"--[a-z][a-z-]+", outside)) <= options_of_update(), text
    assert str(store / ".update-") not in text
    return text


def refused(
    kind: type[AtlasError], store: Path, source: Any, **options: Any
) -> tuple[AtlasError, str]:
    with pytest.raises(kind) as raised:
        update(store, source, **options)
    assert isinstance(raised.value, kind)
    return raised.value, check_words(raised.value, store)


def test_a_covariate_that_the_study_lacks(tmp_path: Path) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    cells = make_study(1, 300, range(60))
    cells.obs["site"] = ["a", "b"] * 150
    store.append(cells, study="reference", **KEYS)
    run = train_small(store, tmp_path / "run", categorical_covariates=["site"], max_epochs=1)
    atlas.keep(store, run, device="cpu")
    error, text = refused(ConfigError, store.path, make_study(3, 200, range(60)))
    assert error.path == store.path
    assert "what to do: fill them in in the input: the model was trained with" in text


def test_a_column_of_the_input_that_an_update_would_write(living_store: Path) -> None:
    query = make_study(3, 200, range(60))
    query.obs["scvi_label"] = "FROM_ELSEWHERE"
    error, _ = refused(ConfigError, living_store, query)
    assert (error.path, error.do) == (living_store, "rename that column in the input")
    assert isinstance(error.__cause__, ConfigError)  # as it was raised


def test_genes_of_another_kind_and_studies_that_are_not_there(living_store: Path) -> None:
    query = make_study(3, 200, range(60))
    query.var_names = [f"gene{i}" if i < 20 else f"other{i}" for i in range(60)]
    error, text = refused(ModelError, living_store, query)
    assert error.path == living_store
    assert "--orthologs TABLE" in text
    error, _ = refused(ConfigError, living_store, query, apart_from=["none"])
    assert error.path == living_store


def test_an_index_of_other_rows(living_folder: Path, living_store: Path) -> None:
    (index,) = living_store.glob("parts/.indexes/scvi-*")
    damaged = next(path for path in index.iterdir() if path.suffix == ".npy")
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")
    error, _ = refused(CorruptStoreError, living_store, living_folder / "q.h5ad")
    assert error.path == damaged  # the atlas's own file, and what its restoring mends
    assert "--fresh" not in str(error)


def test_a_loss_that_is_not_finite(living_folder: Path, living_store: Path) -> None:
    error, text = refused(TrainingError, living_store, living_folder / "q.h5ad", lr=1e30)
    assert error.path == living_store
    assert "update with a lower --lr" in text
    (name,) = re.findall(r"listed in (\S+)\)", text)
    assert (living_store / name).is_file()


def test_a_damaged_checkpoint(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("atlas.workflows.surgery.merged", stop)
        with pytest.raises(RuntimeError, match="stopped here"):
            update(living_store, living_folder / "q.h5ad")
    for path in living_store.glob(".update-kang/run/checkpoints/*/*.json"):
        path.write_text("{")
    error, text = refused(CheckpointError, living_store, living_folder / "q.h5ad")
    assert (error.path, error.do) == (living_store, "start the update anew with --fresh")
    assert "(.update-kang/run/checkpoints/" in text
    update(living_store, living_folder / "q.h5ad", fresh=True)


def _another_device(work: Path) -> None:
    recorded = current_environment(torch.device("cpu"))
    object.__setattr__(recorded, "device", "cuda")
    check_environment(recorded, torch.device("cpu"), work / "run")


def _fewer_processors(work: Path) -> None:
    with torch_threads(0, 10_000, work / "run", 2**50):
        pass


def _locked_run(work: Path) -> None:
    with open_run(work / "run", resume=True), open_run(work / "run", resume=True):
        pass


def _full_disk(work: Path) -> None:
    with io_errors("The checkpoint cannot be written", work / "run"):
        raise OSError(28, "No space left on device")


def _damaged_weights(work: Path) -> None:
    shutil.copytree(work / "store" / "models" / "scvi" / "1", work / "copy")
    for path in (work / "copy").glob("weights*"):
        path.write_bytes(b"")
    shutil.copytree(work / "copy", work / "run", dirs_exist_ok=True)
    atlas.load_model(work / "run")


def _one_cell(work: Path) -> None:
    training_loader(
        BatchNorm(3),  # type: ignore[arg-type]
        atlas.open_store(work / "store"),
        [(0, 1)],
        TrainConfig(),
        torch.device("cpu"),
        CellColumns(),
        Ranks(),
    )


def _columns_of_a_classifier(work: Path) -> None:
    labelling._check_free(atlas.open_store(work / "store"), "cell_type")


def _labels_of_one_study_each(work: Path) -> None:
    leave_out(
        np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32),
        np.repeat([0, 1], 10),
        Categories(np.repeat([0, 1], 10), ["a", "b"]),
        LabelTree(("x", "y"), (-1, -1)),
        k=2,
    )


def _other_rows(work: Path) -> None:
    store = atlas.open_store(work / "store")
    stored_index(store, "scvi", store.embedding("scvi") + 1)


def _new_part(work: Path) -> None:
    part = Part("parts/kang/index", {"genes.npy": "0"})
    checked_folder(work / "store", part, "the study 'kang'")


def _unseen_batch(_: Path) -> None:
    check_reference(SimpleNamespace(config=SimpleNamespace(encode_batch=False)))  # type: ignore[arg-type]


ANEW = "start the update anew with --fresh"
CASES: dict[Callable[[Path], object], tuple[type[AtlasError], str]] = {
    _another_device: (CheckpointError, f"go on on such a device, or {ANEW}"),
    _fewer_processors: (CheckpointError, f"go on on a machine with 10000 processors, or {ANEW}"),
    _locked_run: (CheckpointError, "wait for it to end"),
    _full_disk: (
        CheckpointError,
        "free space or repair the disk, then run the same command again: it goes on",
    ),
    _damaged_weights: (CheckpointError, ANEW),
    _one_cell: (ConfigError, "update by a study of more cells"),
    _columns_of_a_classifier: (ConfigError, "rename that column in the input"),
    _labels_of_one_study_each: (ConfigError, "do without calibration: --false-unknown 0"),
    _other_rows: (StoreError, "go back to a state before"),
    _new_part: (CorruptStoreError, ANEW),
    _unseen_batch: (ModelError, "train the reference anew: `atlas train … --encode-batch"),
    lambda work: check_same_run({"lr": 1}, {"lr": 2}, work / "run"): (CheckpointError, ANEW),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_step_says(case: Callable[[Path], object], living_store: Path) -> None:
    work = living_store / ".update-kang"
    work.mkdir()
    (work / "run").mkdir()
    opened = atlas.open_store(living_store)
    fork(living_store, work / "store", opened.manifest)
    kind, do = CASES[case]
    with pytest.raises(kind) as raised, told_of_the_atlas(living_store, work):
        case(work)
    text = check_words(raised.value, living_store)
    assert raised.value.do is not None
    assert raised.value.do.startswith(do) or do in raised.value.do
    assert type(raised.value) is type(raised.value.__cause__ or raised.value)
    if case is _other_rows:
        assert f"`atlas embed RUN {living_store} --name scvi`" in text
        assert Path(str(raised.value.path)).is_relative_to(living_store / "parts" / ".indexes")
    if case is _new_part:
        assert "found: .update-kang/store/parts/kang/index/genes.npy" in text


def test_a_soma_experiment_of_several_measurements(living_store: Path, tmp_path: Path) -> None:
    tiledbsoma = pytest.importorskip("tiledbsoma")
    import tiledbsoma.io as io

    uri = str(tmp_path / "experiment")
    io.from_anndata(uri, make_study(3, 20, range(60)), measurement_name="RNA")
    with tiledbsoma.open(uri, "w") as experiment:
        experiment.ms.add_new_collection("ATAC", tiledbsoma.Measurement)
    error, _ = refused(AtlasError, living_store, uri, ingest={"batch_key": "batch"})
    assert error.do is not None
    assert error.do.startswith("from Python: atlas.update(…, ingest={'measurement': '")


def test_other_errors_are_told_as_they_are(
    living_folder: Path, living_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"at {living_store / '.update-kang'}")

    monkeypatch.setattr(living, "extend_reference", fail)
    with pytest.raises(RuntimeError, match=r"at .*update-kang$"):
        update(living_store, living_folder / "q.h5ad")
    with pytest.raises(StoreError, match="no such model") as raised:
        update(living_store, living_folder / "q.h5ad", model="none")
    assert raised.value.__cause__ is None
