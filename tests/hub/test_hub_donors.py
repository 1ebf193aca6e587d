"""Names of donors leave only where they are named; labels of a model whose column is not here."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from hub_helpers import made_up

import atlas
from atlas.cli import main
from atlas.errors import ConfigError, MissingColumnError
from atlas.hub.donors import (
    is_donor_column,
    looks_like_donor,
    neutral_batches,
    tells_of,
)
from atlas.models import LabelTree
from atlas.workflows import prepare_share

_TRAINING = {"max_epochs": 3, "lr": 1e-2, "minibatch_size": 64, "threads": 1, "device": "cpu"}
_SMALL = {"n_hidden": 16, "n_latent": 3}
_PEOPLE = ("Jane-Doe", "John-Roe", "Ann-Poe")


# what is a donor's


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *((name, True) for name in ("donor", "Donor_ID", "donors", "patient", "PatientID")),
        *((name, True) for name in ("subject.id", "individual", "Individual ID", "donor_name")),
        *((name, True) for name in ("participant", "harmonized_donor_id", "patient barcode")),
        *((name, True) for name in ("patient_no", "indiv", "volunteer", "person_id")),
        *((name, False) for name in ("donor_age", "patient_group", "n_donors_pooled", "batch")),
        *((name, False) for name in ("sample", "cell_type", "personality", "subjective", "")),
    ],
)
def test_columns_of_donors(name: str, is_one: bool) -> None:
    assert is_donor_column(name) == is_one


@pytest.mark.parametrize(
    ("name", "donors", "tells"),
    [
        ("Jane", ["Jane", "John"], True),
        ("jane", ["Jane"], True),
        ("ctrl|Jane", ["Jane"], True),
        ("lane2_Jane-Doe_r1", ["Jane-Doe"], True),
        ("Janet", ["Jane"], False),
        ("kang_1016", ["1016"], True),
        ("kang_1016", ["101"], False),
        ("1", ["1"], True),
        ("lane 1", ["1"], False),
        ("ctrl", ["Jane"], False),
        ("Jürgen_a", ["Jürgen"], True),
        ("a.b", ["axb"], False),
        ("lane1_D3", ["D3"], True),
        ("lane1_D31", ["D3"], False),
        ("lane A", ["A"], False),
    ],
)
def test_names_that_tell_of_donors(name: str, donors: list[str], tells: bool) -> None:
    assert tells_of(name, donors) == tells


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        *((name, True) for name in ("donor_A", "donor1", "lane2_Donor-12", "Patient P7")),
        *((name, True) for name in ("subject id 4", "individual_3b")),
        *((name, False) for name in ("donor_liver", "patient-derived", "kang_ctrl", "batch 1")),
        *((name, False) for name in ("zheng2017_facs", "pbmc3k", "subjective")),
    ],
)
def test_names_that_say_so_themselves(name: str, looks: bool) -> None:
    assert looks_like_donor(name) == looks


def test_neutral_names_are_of_their_study_and_apart() -> None:
    batches = ["a/Jane", "a/batch 1", "b/x", "whole", "a/John"]
    new = neutral_batches(batches, {"a/Jane", "a/John", "b/x", "whole"}, {"whole"})
    assert new == {"a/Jane": "a/batch 2", "a/John": "a/batch 3", "b/x": "b/batch 1"}
    theirs = ["Jane-Doe", "batch 1", "q/x"]  # of scvi-tools, without a study
    assert neutral_batches(theirs, {"Jane-Doe"}, {"q"}) == {"Jane-Doe": "batch 2"}


# batches that are donors


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``s.atlas`` of two studies whose batches are donors, embedded by ``scanvi``; ``new.h5ad``."""
    folder = tmp_path_factory.mktemp("clinic")
    store = atlas.create_store(folder / "s.atlas")
    for i in (1, 2):
        adata = made_up(i)
        adata.obs["donor"] = [f"{_PEOPLE[j % 3]}-{i}" for j in range(adata.n_obs)]
        adata.obs["sex"] = np.random.default_rng(i).choice(["f", "m"], adata.n_obs)
        store.append(adata, study=f"study_{i}", batch_key="donor", label_key="cell_type")
    genes = atlas.select_genes(store, 50)
    options = {**_TRAINING, **_SMALL, "max_epochs": 10, "classifier_epochs": 2}
    model = atlas.train(store, "scanvi", genes=genes, out=folder / "scanvi", **options)
    atlas.embed(model, store, device="cpu")
    made_up(3).write_h5ad(folder / "new.h5ad")
    return folder


def _store(clinic: Path) -> atlas.CountStore:
    return atlas.open_store(clinic / "s.atlas")


def _names(package: Path) -> list[str]:
    """Those of the people in any file of a package."""
    content = b"".join(p.read_bytes() for p in sorted(package.rglob("*")) if p.is_file())
    return [name for person in _PEOPLE for name in person.split("-") if name.encode() in content]


def test_donors_leave_by_no_name_of_a_batch(clinic: Path, tmp_path: Path) -> None:
    store = _store(clinic)
    shipment = prepare_share(store, clinic / "scanvi")
    line = dict(shipment.listing())["batches"]
    assert line.startswith("study_1/batch 1, study_1/batch 2, study_1/batch 3, study_2/batch 1, ")
    assert "6 of the names, from obs column donor, look like donors: these are replaced" in line
    assert "(to give them away: --obs-columns donor, or --batch-names all)" in line
    shipment.write(tmp_path / "p")
    assert _names(tmp_path / "p") == []
    package = atlas.load_package(tmp_path / "p")
    own = [name for name in store.batches if name]
    assert package.batches.names == package.model.batches == tuple(
        f"study_{i}/batch {j}" for i in (1, 2) for j in (1, 2, 3)
    )  # fmt: skip
    np.testing.assert_array_equal(package.batches.codes, store.obs_codes["batch"])
    assert len(own) == 6


@pytest.mark.parametrize(
    ("options", "first", "words"),
    [
        ({"obs_columns": ["donor"]}, "study_1/Ann-Poe-1", ""),
        ({"batch_names": "all"}, "study_1/Ann-Poe-1", "and leave by --batch-names all"),
        ({"batch_names": "none"}, "study_1/batch 1", "are replaced, so none leaves"),
        ({"obs_columns": ["sex"]}, "study_1/batch 1", "look like donors"),
    ],
)
def test_donors_leave_where_they_are_named(
    clinic: Path, tmp_path: Path, options: dict[str, Any], first: str, words: str
) -> None:
    shipment = prepare_share(_store(clinic), clinic / "scanvi", **options)
    line = dict(shipment.listing())["batches"]
    assert line.startswith(first)
    assert words in line
    assert ("look like donors" in line) == (words != "")
    shipment.write(tmp_path / "p")
    assert bool(_names(tmp_path / "p")) == ("Ann" in first)


def test_a_choice_of_names_that_there_is_not(clinic: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no such choice[^\n]*\n  found: 'some'\n  expected: 'no-d"
    ):
        atlas.share(_store(clinic), clinic / "scanvi", tmp_path / "p", batch_names="some")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stranger(clinic: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``query.atlas`` and ``run``, mapped onto a package with some names of batches."""

    def made(names: str) -> Path:
        home = tmp_path_factory.mktemp("stranger")
        atlas.share(_store(clinic), clinic / "scanvi", home / "p.zip", batch_names=names)  # type: ignore[arg-type]
        package = atlas.fetch(home / "p.zip", home / "reference")
        store = atlas.create_store(home / "query.atlas")
        query = anndata.read_h5ad(clinic / "new.h5ad")
        query.obs["patient"] = [f"Max-{i % 2}" for i in range(query.n_obs)]
        store.append(query, study="study_3", batch_key="patient", label_key="cell_type")
        mapped = atlas.extend_reference(package.model, store, out=home / "run", **_TRAINING)
        atlas.embed(mapped, store, device="cpu")
        return home

    return made


def test_a_stranger_maps_and_labels_without_the_names(
    stranger: Callable[[str], Path], tmp_path: Path
) -> None:
    """To the same bits as with them; and what comes of it is shared without names in its turn."""
    found = []
    for names in ("no-donors", "all"):
        home = stranger(names)
        store = atlas.open_store(home / "query.atlas")
        options = {"embedding": "scanvi", "k": 20, "name": None, "false_unknown": 0.1}
        options |= {"calibrate_by": "batch"}
        package = atlas.load_package(home / "reference")
        labels = atlas.transfer_labels(store, reference=package, **options)
        assert labels.score is not None
        found.append((store.embedding("scanvi"), labels.table))
        atlas.share(store, home / "run", tmp_path / names)
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1].equals(found[1][1])
    assert _names(tmp_path / "no-donors") == []
    model = atlas.load_package(tmp_path / "no-donors").model
    assert model.batches[-2:] == model.surgery[0].batches == ("study_3/batch 1", "study_3/batch 2")
    content = (tmp_path / "no-donors" / "model" / "model.json").read_text()
    assert "Max" not in content
    # names of a reference that is not in the store were its owner's to give
    assert "study_1/Ann-Poe-1" in atlas.load_package(tmp_path / "all").model.batches


def test_a_batch_of_several_columns_and_a_study_named_as_a_donor(
    clinic: Path, tmp_path: Path
) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    adata = made_up(1)
    adata.obs["donor"] = ["Jane-Doe"] * 150 + ["John-Roe"] * 150
    store.append(adata, study="Jane-Doe", batch_key=["batch", "donor"])
    adata.obs["batch"] = adata.obs["donor"].map({"Jane-Doe": "x", "John-Roe": "y"})
    store.append(adata, study="pair", batch_key="batch")
    adata.obs["batch"] = "one"
    store.append(adata, study="whole")
    model = atlas.train(
        store,
        "scvi",
        genes=atlas.select_genes(store, 50),
        out=tmp_path / "run",
        **{**_TRAINING, **_SMALL},
    )
    atlas.embed(model, store, device="cpu")
    listing = dict(prepare_share(store, model).listing())
    assert listing["batches"].startswith(
        "Jane-Doe/batch 1, Jane-Doe/batch 2, Jane-Doe/batch 3, Jane-Doe/batch 4, pair/x, pair/y, w"
    )
    assert "4 of the names, from obs column donor, batch, look" in listing["batches"]
    other = dict(prepare_share(store, model, obs_columns=["batch"]).listing())
    assert other["batches"].startswith("Jane-Doe/batch 1, Jane-Doe/batch 2, Jane-Doe/batch 3, ")
    assert "4 of the names" in other["batches"]
    given = dict(prepare_share(store, model, obs_columns=["donor"]).listing())
    assert given["batches"].count("|Jane-Doe") == given["batches"].count("|John-Roe") == 2
    assert listing["studies"].endswith("named as donors are, and leave: Jane-Doe")


def test_batches_that_are_one_donor_each_are_pointed_out(tmp_path: Path) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    adata = made_up(1)
    adata.obs["donor"] = adata.obs["batch"].map({"batch_1": "Jane", "batch_2": "John"})
    store.append(adata, study="one", batch_key="batch", label_key="cell_type")
    options = {**_TRAINING, **_SMALL, "max_epochs": 1}
    model = atlas.train(
        store, "scvi", genes=atlas.select_genes(store, 50), out=tmp_path / "run", **options
    )
    atlas.embed(model, store, device="cpu")
    line = dict(prepare_share(store, model).listing())["batches"]
    assert line == (
        "one/batch_1, one/batch_2; each batch of one is one donor of obs column donor; if their "
        "names tell whose they are, replace them: --batch-names none"
    )
    line = dict(prepare_share(store, model, batch_names="none").listing())["batches"]
    assert line == "one/batch 1, one/batch 2; 2 names are replaced"
    line = dict(prepare_share(store, model, obs_columns=["donor"]).listing())["batches"]
    assert line == "one/batch_1, one/batch_2"


def test_a_column_that_is_none_of_donors_by_its_name(tmp_path: Path) -> None:
    """Its values say it; it is named as any is. Of a study that was dropped nothing is known."""
    store = atlas.create_store(tmp_path / "s.atlas")
    adata = made_up(1)
    adata.obs["lane"] = [f"donor_{i}" for i in adata.obs["batch"]]
    adata.obs["lane"] = adata.obs["lane"].str.replace("batch_", "")
    store.append(adata, study="one", batch_key="lane")
    store.append(adata, study="two", batch_key="batch")
    options = {**_TRAINING, **_SMALL, "max_epochs": 1}
    genes = atlas.select_genes(store, 50)
    model = atlas.train(store, "scvi", genes=genes, out=tmp_path / "run", **options)
    atlas.embed(model, store, device="cpu")
    line = dict(prepare_share(store, model).listing())["batches"]
    assert line.startswith("one/batch 1, one/batch 2, two/batch_1, two/batch_2; 2 of the names, fr")
    assert "from obs column lane, batch, look like donors" in line
    line = dict(prepare_share(store, model, obs_columns=["lane"]).listing())["batches"]
    assert line == "one/donor_1, one/donor_2, two/batch_1, two/batch_2"
    store.drop("one")
    line = dict(prepare_share(store, model).listing())["batches"]
    assert line.startswith("one/batch 1, ")
    store.drop("two")
    store.append(adata, study="one", batch_key="lane")
    atlas.embed(model, store, device="cpu")
    line = dict(prepare_share(store, model).listing())["batches"]
    assert line.endswith(
        "of studies that are not in the store (two) nothing is known of donors here"
    )


def test_covariates_that_are_donors(tmp_path: Path) -> None:
    store = atlas.create_store(tmp_path / "s.atlas")
    adata = made_up(1)
    adata.obs["donor"] = [_PEOPLE[i % 3] for i in range(300)]
    adata.obs["sample"] = [("Jane-Doe_x", "pool")[i % 2] for i in range(300)]
    store.append(adata, study="one", batch_key="batch")
    model = atlas.train(
        store, "scvi", genes=atlas.select_genes(store, 50), out=tmp_path / "run",
        categorical_covariates=["donor", "sample"], **{**_TRAINING, **_SMALL, "max_epochs": 1},
    )  # fmt: skip
    atlas.embed(model, store, device="cpu")
    shipment = prepare_share(store, model)
    listing = dict(shipment.listing())
    assert listing["covariate donor"].endswith(
        "3 values look like donors and are replaced; --obs-columns donor gives them away"
    )
    assert "its values: sample 1 of the reference, pool; 1 values" in listing["covariate sample"]
    shipment.write(tmp_path / "p")
    assert _names(tmp_path / "p") == []
    named = prepare_share(store, model, obs_columns=["donor"])
    listing = dict(named.listing())
    assert "Ann-Poe, Jane-Doe, John-Roe" in listing["covariate donor"]
    assert "Jane-Doe_x" in listing["covariate sample"]
    # a stranger's donors are others than the reference's
    package = atlas.load_package(tmp_path / "p")
    query = made_up(3)
    query.obs["donor"], query.obs["sample"] = "Max", "pool"
    other = atlas.create_store(tmp_path / "q.atlas")
    other.append(query, study="two", batch_key="batch")
    grown = atlas.extend_reference(package.model, other, out=tmp_path / "grown", **_TRAINING)
    assert dict(grown.columns.categorical)["donor"] == (
        *(f"donor {i} of the reference" for i in (1, 2, 3)),
        "Max",
    )
    atlas.embed(grown, other, device="cpu")


def test_in_the_command(clinic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["share", str(clinic / "s.atlas"), "--model", str(clinic / "scanvi")]
    command += ["--to", str(tmp_path / "p.zip")]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "look like donors: these are replaced" in said
    assert "Jane" not in said
    assert main([*command, "--batch-names", "all", "--yes"]) == 0
    assert "study_1/Jane-Doe-1" in capsys.readouterr().out
    assert main(["fetch", str(tmp_path / "p.zip"), "--to", str(tmp_path / "p")]) == 0
    said = capsys.readouterr().out
    assert "index: none, search is exact: no index is kept with the embedding" in said
    with pytest.raises(SystemExit):
        main([*command, "--batch-names", "some"])


# labels of a column that is not here


@pytest.fixture(scope="module")
def elsewhere(clinic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without the column of the labels that its ``scanvi`` was trained with."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(clinic / "s.atlas", folder / "s.atlas")
    model = atlas.load_model(clinic / "scanvi")
    columns = dataclasses.replace(model.columns, label="fine", unlabeled="type_4")
    dataclasses.replace(model, columns=columns).save(folder / "scanvi")
    return folder


def test_a_scanvi_without_its_column_goes_with_the_stores_labels(
    elsewhere: Path, tmp_path: Path
) -> None:
    store = atlas.open_store(elsewhere / "s.atlas")
    shipment = prepare_share(store, elsewhere / "scanvi")
    assert dict(shipment.listing())["labels"] == (
        "the store's: type_1, type_2, type_3; the model's are of obs column fine, which the store "
        "does not have"
    )
    shipment.write(tmp_path / "p")
    package = atlas.load_package(tmp_path / "p")
    assert package.labels is not None
    assert package.labels.names == ("type_1", "type_2", "type_3")  # its word for none is type_4
    own = np.array([*store.labels, ""])[store.obs_codes["label"]]
    given = np.array([*package.labels.names, ""])[package.labels.codes]
    np.testing.assert_array_equal(given, np.where(own == "type_4", "", own))
    assert package.manifest.reference.label_key is None
    # a column that is asked for has to be there
    with pytest.raises(MissingColumnError, match="fine"):
        prepare_share(store, elsewhere / "scanvi", label_key="fine")


def test_a_scanvi_without_its_column_and_any_label(
    clinic: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's study, mapped onto a scanvi and shared in its turn."""
    store = atlas.create_store(tmp_path / "q.atlas")
    query = anndata.read_h5ad(clinic / "new.h5ad")
    del query.obs["cell_type"]
    store.append(query, study="study_3", batch_key="batch")
    model = atlas.load_model(elsewhere / "scanvi")
    assert isinstance(model.labels, LabelTree)
    mapped = atlas.extend_reference(model, store, out=tmp_path / "run", **_TRAINING)
    atlas.embed(mapped, store, device="cpu")
    command = ["share", str(store.path), "--model", str(tmp_path / "run"), "--yes"]
    assert main([*command, "--to", str(tmp_path / "p")]) == 0
    said = capsys.readouterr().out
    assert "labels               none; the model's are of obs column fine, which" in said
    package = atlas.load_package(tmp_path / "p")
    assert package.labels is None
    assert package.model.labels == mapped.labels
