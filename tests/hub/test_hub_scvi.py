"""Models of scvi-tools come in with their latent space, and ours go there; by the real package."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from anndata import AnnData

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, ModelError
from atlas.models import Inputs, TrainedModel, load_model

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cells(request) -> AnnData:
    path = Path(__file__).parents[2].parent / "shared" / "data" / "pbmc_4batch_3study.h5ad"
    if not path.is_file():
        pytest.skip(f"real counts are not here: {path}")
    adata = ad.read_h5ad(path)[::50, 200:320].copy()
    adata.X = adata.X.astype(np.float32)
    return adata


def trained(
    cells: AnnData, kind: str = "SCVI", *, linear: bool = False, **options: Any
) -> tuple[Any, AnnData]:
    adata = cells.copy()
    scvi.settings.seed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
        model = scvi.model.SCVI(adata, n_latent=4, n_hidden=16, **options)
        quick = {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"}
        model.train(**quick, logger=False)
        if kind == "SCANVI":
            model = scvi.model.SCANVI.from_scvi_model(model, "Unknown", linear_classifier=linear)
            model.train(**quick, logger=False)
    return model, adata


def inputs(model: TrainedModel, adata: AnnData) -> Inputs:
    code = {name: i for i, name in enumerate(model.batches)}
    batch = torch.tensor([code[name] for name in adata.obs["batch"]])
    counts = torch.from_numpy(adata.X.toarray())
    return Inputs(counts, batch)


def latent(model: TrainedModel, adata: AnnData) -> np.ndarray:
    return model.embed(inputs(model, adata)).numpy()


SETTINGS = {
    "defaults": {},
    "poisson": {"gene_likelihood": "poisson"},
    "nb, two layers": {"gene_likelihood": "nb", "n_layers": 2},
    "gene-batch": {"dispersion": "gene-batch", "encode_covariates": True},
    "latent library": {"use_observed_lib_size": False, "n_layers": 2, "encode_covariates": True},
    "layer norm": {"use_layer_norm": "both", "use_batch_norm": "none", "encode_covariates": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_latent_here_and_back_there(tmp_path, cells, setting):
    theirs, adata = trained(cells, **SETTINGS[setting])
    theirs.save(tmp_path / "theirs")
    expected = theirs.get_latent_representation()
    ours = atlas.import_scvi(tmp_path / "theirs")
    assert ours.genes == tuple(adata.var_names)
    np.testing.assert_allclose(latent(ours, adata), expected, atol=1e-5)
    shares = theirs.get_normalized_expression(n_samples=1, transform_batch="pbmc3k")
    code = ours.batches.index("pbmc3k")
    decoded = ours.decode(torch.from_numpy(expected), torch.full((len(adata),), code))
    assert decoded.shape == shares.shape

    ours.save(tmp_path / "ours")
    atlas.export_scvi(load_model(tmp_path / "ours"), tmp_path / "back")
    fresh = cells.copy()
    back = scvi.model.SCVI.load(tmp_path / "back", adata=fresh, accelerator="cpu")
    np.testing.assert_allclose(back.get_latent_representation(), expected, atol=1e-5)
    for name, value in theirs.module.state_dict().items():
        used = "px_r_decoder" not in name
        used &= name != "px_r" or ours.config.gene_likelihood != "poisson"
        used &= "px_dropout" not in name or ours.config.gene_likelihood == "zinb"
        used &= "l_encoder" not in name or ours.config.library == "latent"
        if used:
            assert torch.equal(back.module.state_dict()[name], value), name


def test_decoder_is_theirs(tmp_path, cells):
    theirs, adata = trained(cells)
    theirs.save(tmp_path / "theirs")
    ours = atlas.import_scvi(tmp_path / "theirs")
    z = torch.from_numpy(theirs.get_latent_representation())
    batch = torch.zeros(len(adata), dtype=torch.int64)
    with torch.no_grad():
        library = torch.zeros(len(adata), 1)
        expected = theirs.module.generative(z, library, batch[:, None])["px"].scale
    torch.testing.assert_close(ours.decode(z, batch), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_scanvi_gives_its_latent_and_its_labels(tmp_path, cells, linear):
    theirs, adata = trained(cells, "SCANVI", n_layers=2, linear=linear)
    theirs.save(tmp_path / "theirs")
    ours = atlas.import_scvi(tmp_path / "theirs")
    np.testing.assert_allclose(latent(ours, adata), theirs.get_latent_representation(), atol=1e-5)
    assert ours.training["imported"]["model"] == "SCANVI"
    assert ours.name == "scanvi"
    expected = theirs.predict(soft=True)
    assert list(ours.labels.classes) == list(expected.columns)
    found = ours.module.log_probabilities(inputs(ours, adata)).exp().numpy()
    np.testing.assert_allclose(found, expected.to_numpy(), atol=1e-5)


def test_a_model_trained_here_goes_there(tmp_path, cells):
    store = atlas.create_store(tmp_path / "store")
    store.append(cells, study="pbmc", batch_key="batch")
    options = {"n_hidden": 16, "n_latent": 4, "device": "cpu"}
    genes = list(cells.var_names)
    model = atlas.train(store, out=tmp_path / "run", genes=genes, max_epochs=2, **options)
    z = atlas.embed(model, store, name=None)
    atlas.export_scvi(model, tmp_path / "there", batch_key="atlas_batch")
    adata = atlas.to_anndata(store)[:, genes].copy()
    back = scvi.model.SCVI.load(tmp_path / "there", adata=adata, accelerator="cpu")
    np.testing.assert_allclose(back.get_latent_representation(), z, atol=1e-5)
    with pytest.raises(ModelError, match="There is a model here already"):
        atlas.export_scvi(model, tmp_path / "there")
    presence = np.ones((1, len(genes)), bool)
    presence[0, 3] = False
    with pytest.raises(ModelError, match=rf"did not measure\n.*{genes[3]} was not measured"):
        atlas.export_scvi(dataclasses.replace(model, presence=presence), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_imported_batches_are_named_as_in_a_store(tmp_path, cells):
    theirs, adata = trained(cells, encode_covariates=True)
    theirs.save(tmp_path / "theirs")
    names = {name: f"pbmc/{name}" for name in adata.obs["batch"].unique()}
    model = atlas.import_scvi(tmp_path / "theirs", batches=names)
    store = atlas.create_store(tmp_path / "store")
    store.append(adata, study="pbmc", batch_key="batch")
    z = atlas.embed(model, store, name=None)
    order = store.index_array("input_position")
    np.testing.assert_allclose(z, theirs.get_latent_representation()[order], atol=1e-5)
    with pytest.raises(ConfigError, match="no such batches"):
        atlas.import_scvi(tmp_path / "theirs", batches={"nowhere": "x"})
    with pytest.raises(ConfigError, match="Two batches would have the same name"):
        atlas.import_scvi(tmp_path / "theirs", batches=dict.fromkeys(names, "x"))


def test_numbers_of_numpy_among_the_arguments_and_as_batches(tmp_path, cells):
    adata = cells.copy()
    adata.obs["batch"] = adata.obs["batch"].astype("category").cat.codes.astype(np.int64)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata, n_hidden=np.int64(16), dropout_rate=np.float64(0.2))
    model.train(max_epochs=1, enable_progress_bar=False, accelerator="cpu", logger=False)
    model.save(tmp_path / "theirs")
    ours = atlas.import_scvi(tmp_path / "theirs")
    assert ours.batches == tuple(str(code) for code in sorted(set(adata.obs["batch"])))
    assert (ours.config.n_hidden, ours.config.dropout_rate) == (16, 0.2)
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    expected = model.get_latent_representation()
    np.testing.assert_allclose(latent(ours, adata), expected, atol=1e-5)


def test_names_that_come_twice_are_refused(tmp_path, cells):
    theirs, _ = trained(cells)
    theirs.save(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.pt"
    saved = torch.load(path, weights_only=False)  # our own file
    saved["var_names"][1] = saved["var_names"][0]
    torch.save(saved, path)
    with pytest.raises(ModelError, match=rf"genes .* the same name\n.*{saved['var_names'][0]}"):
        atlas.import_scvi(tmp_path / "theirs")


def test_models_come_in_and_go_without_scvi_tools(tmp_path, cells):
    theirs, _ = trained(cells)
    theirs.save(tmp_path / "theirs")
    script = """
import sys
for name in ("scvi", "lightning", "lightning.pytorch", "pytorch_lightning"):
    sys.modules[name] = None
import atlas
atlas.export_scvi(atlas.import_scvi(sys.argv[1]), sys.argv[2])
try:
    atlas.ScviDataModule
except atlas.errors.ConfigError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", script, tmp_path / "theirs", tmp_path / "back"]
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "needs the package scvi-tools" in ran.stdout
    assert "pip install 'atlas-trainer[scvi]'" in ran.stdout
    assert (tmp_path / "back" / "model.pt").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_distribution": "ln"}, "latent_distribution='ln'"),
        ({"deeply_inject_covariates": False}, "deeply_inject_covariates=False"),
        ({"use_batch_norm": "decoder"}, "use_batch_norm='decoder'"),
    ],
)
def test_what_no_model_here_does_is_refused(tmp_path, cells, options, message):
    theirs, _ = trained(cells, **options)
    theirs.save(tmp_path / "theirs")
    with pytest.raises(ModelError, match=message):
        atlas.import_scvi(tmp_path / "theirs")


def test_covariates_are_refused(tmp_path, cells):
    adata = cells.copy()
    adata.obs["depth"] = np.arange(len(adata), dtype=float)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["depth"])
    model = scvi.model.SCVI(adata, n_hidden=8)
    model.is_trained_ = True
    model.save(tmp_path / "theirs")
    with pytest.raises(ModelError, match="extra_continuous_covs"):
        atlas.import_scvi(tmp_path / "theirs")


def test_from_the_command_line(tmp_path, cells, capsys):
    theirs, _ = trained(cells)
    theirs.save(tmp_path / "theirs")
    there, here, back = (str(tmp_path / name) for name in ("theirs", "here", "back"))
    assert main(["import-scvi", there, "--out", here, "--study", "pbmc"]) == 0
    assert set(load_model(here).batches) == {f"pbmc/{b}" for b in cells.obs["batch"].unique()}
    assert main(["export-scvi", here, "--out", back]) == 0
    first, second = (atlas.import_scvi(folder).module.state_dict() for folder in (there, back))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert main(["import-scvi", back, "--out", here]) == 2
    assert "The folder is not empty" in capsys.readouterr().err
    assert main(["export-scvi", here, "--out", back]) != 0
    assert "There is a model here already" in capsys.readouterr().err


class Payload:
    """What a pickle can do to who loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_something_is_refused(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    content = {"model_state_dict": {}, "var_names": [], "attr_dict": Payload(tmp_path / "pwned")}
    torch.save(content, folder / "model.pt")
    with pytest.raises(ModelError, match=r"cannot be read safely\n.*asks for posix.system"):
        atlas.import_scvi(folder)
    (folder / "model.pt").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    with pytest.raises(ModelError, match="cannot be read safely"):
        atlas.import_scvi(folder)
    assert not (tmp_path / "pwned").exists()


class Pickled:
    """Something that is pickled as told."""

    def __init__(self, *how: Any) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return self.how


def test_an_array_of_forged_objects_is_refused(tmp_path, cells):
    # Objects come as a list. With the flag that says so taken out of their dtype, NumPy takes the
    # bytes of a file for addresses in memory.
    theirs, _ = trained(cells)
    theirs.save(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.pt"
    saved = torch.load(path, weights_only=False)  # our own file
    dtype = Pickled(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
    state = (1, (1,), dtype, False, (0x4141414141414141).to_bytes(8, "little"))
    forged = Pickled(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state)
    torch.save({**saved, "var_names": forged}, path)
    with pytest.raises(ModelError, match=r"not a model of scvi-tools.*\n.*an array of 'O8'"):
        atlas.import_scvi(tmp_path / "theirs")


def test_whatever_is_damaged_is_an_error(tmp_path, cells):
    theirs, _ = trained(cells, use_observed_lib_size=False)
    theirs.save(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.pt"
    saved = torch.load(path, weights_only=False)  # our own file

    def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        for key in node if isinstance(node, dict) else ():
            yield (*above, key)
            yield from places(node[key], (*above, key))

    refused = 0
    for place in places(saved):
        for value in (None, "x", -1, np.zeros(3)):
            changed = copy.deepcopy(saved)
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            torch.save(changed, path)
            try:
                atlas.import_scvi(tmp_path / "theirs")
            except (ModelError, ConfigError):
                refused += 1
    assert refused > 200  # the rest is not needed, as the history

    whole = io.BytesIO()
    torch.save(saved, whole)
    with zipfile.ZipFile(whole) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(parts[pickled])
        content[rng.integers(len(content))] = rng.integers(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, bytes(content) if name == pickled else part)
        with contextlib.suppress(ModelError, ConfigError):
            atlas.import_scvi(tmp_path / "theirs")


def test_files_that_are_no_models(tmp_path, cells):
    with pytest.raises(ModelError, match=r"no model of scvi-tools here\n.*no model.pt"):
        atlas.import_scvi(tmp_path)
    theirs, _ = trained(cells)
    theirs.save(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.pt"
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be read safely"):
            atlas.import_scvi(tmp_path / "theirs")
    torch.save({"model_state_dict": {}}, path)
    with pytest.raises(ModelError, match=r"not a model of scvi-tools 1\.x"):
        atlas.import_scvi(tmp_path / "theirs")
    theirs.registry["scvi_version"] = "2.0.0"
    theirs.save(tmp_path / "newer")
    with pytest.raises(ModelError, match=r"SCVI of version 2\.0\.0"):
        atlas.import_scvi(tmp_path / "newer")
