"""10x files of both generations, against scanpy's reader."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import scanpy
from ingest_helpers import assert_same, random_counts, read_counts, write_tenx_v2, write_tenx_v3

from atlas.errors import InputError
from atlas.ingest import open_counts

GENES, TAGS = "Gene Expression", "Antibody Capture"


@pytest.mark.parametrize("memory", [1_000, 1 << 20])
def test_feature_types_are_separated(tmp_path: Path, memory: int) -> None:
    path = tmp_path / "x.h5"
    types = [GENES, TAGS, GENES, GENES, TAGS, GENES, GENES]
    write_tenx_v3(path, random_counts(0, 30, 7), types)
    expected = scanpy.read_10x_h5(path, gex_only=False)
    for kind in (GENES, TAGS):
        chosen = expected[:, expected.var["feature_types"] == kind]
        with open_counts(path, feature_type=kind, memory=memory) as source:
            assert_same(read_counts(source), chosen.X)
            assert list(source.obs.index) == list(chosen.obs_names)
            assert list(source.var.index) == list(chosen.var_names)
            for column in ("gene_ids", "feature_types", "genome"):
                assert source.var[column].tolist() == chosen.var[column].tolist()
            other, n = (TAGS, 2) if kind == GENES else (GENES, 5)
            assert source.notes == (f"{path}: features of other types were left out: {n} {other}",)


def test_one_feature_type_leaves_no_note(tmp_path: Path) -> None:
    write_tenx_v3(tmp_path / "x.h5", random_counts(0, 5, 3), [GENES] * 3)
    with open_counts(tmp_path / "x.h5") as source:
        assert source.notes == ()
        assert source.layers == ()


def test_cell_ranger_2(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_tenx_v2(path, random_counts(0, 30, 7))
    expected = scanpy.read_10x_h5(path)
    with open_counts(path, memory=1_000) as source:
        assert_same(read_counts(source), expected.X)
        assert list(source.obs.index) == list(expected.obs_names)
        assert list(source.var.index) == list(expected.var_names)
        assert source.var["gene_ids"].tolist() == expected.var["gene_ids"].tolist()
        assert set(source.var["genome"]) == {"hg19"}
        assert set(source.var["feature_types"]) == {GENES}


def test_probes_have_their_genes(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_tenx_v3(path, random_counts(0, 5, 3), [GENES] * 3)
    with h5py.File(path, "r+") as file:
        file["matrix/features/gene_id"] = np.array([b"ENSG1", b"ENSG1", b"ENSG2"])
        file["matrix/filtered_barcodes"] = np.ones(5, bool)
        file["matrix/features/filtered_probes"] = np.array([True, False, True])
    expected = scanpy.read_10x_h5(path)
    with open_counts(path) as source:
        for column in ("gene_ids", "probe_ids", "filtered_probes"):
            assert source.var[column].tolist() == expected.var[column].tolist()


def test_several_genomes_are_refused(tmp_path: Path) -> None:
    write_tenx_v2(tmp_path / "x.h5", random_counts(0, 5, 3), ("hg19", "mm10"))
    with pytest.raises(InputError, match="more than one genome\n  found: hg19, mm10"):
        open_counts(tmp_path / "x.h5")


def test_a_missing_feature_type_lists_those_there(tmp_path: Path) -> None:
    write_tenx_v3(tmp_path / "x.h5", random_counts(0, 5, 3), [GENES, GENES, TAGS])
    with pytest.raises(
        InputError, match="found: 2 'Gene Expression', 1 'Antibody Capture'"
    ) as caught:
        open_counts(tmp_path / "x.h5", feature_type="Peaks")
    assert "no features of type 'Peaks'" in caught.value.what


@pytest.mark.parametrize("part", ["indptr", "barcodes", "features/name", "features"])
def test_missing_parts_are_named(tmp_path: Path, part: str) -> None:
    write_tenx_v3(tmp_path / "x.h5", random_counts(0, 5, 3), [GENES] * 3)
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        del file["matrix"][part]
    with pytest.raises(InputError, match=f"not a complete 10x matrix\n.*{part.split('/')[-1]}"):
        open_counts(tmp_path / "x.h5")


def test_features_that_do_not_fit_the_matrix(tmp_path: Path) -> None:
    write_tenx_v3(tmp_path / "x.h5", random_counts(0, 5, 3), [GENES] * 3)
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file["matrix/shape"][0] = 4
    with pytest.raises(InputError, match="3 features for 4 columns"):
        open_counts(tmp_path / "x.h5")


def test_layers_and_raw_do_not_go_with_10x(tmp_path: Path) -> None:
    write_tenx_v3(tmp_path / "x.h5", random_counts(0, 5, 3), [GENES] * 3)
    with pytest.raises(InputError, match="neither layers nor raw\n  found: layer 'a'"):
        open_counts(tmp_path / "x.h5", layer="a")
    with pytest.raises(InputError, match=r"found: raw\.X was asked for"):
        open_counts(tmp_path / "x.h5", use_raw=True)
