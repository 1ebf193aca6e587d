"""Each kind of bad input gets one error that says what, found, expected, what to do and where."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from ingest_helpers import assert_same, read_counts, small_study

from atlas.errors import ConfigError, CountsError, InputError, MissingColumnError
from atlas.ingest import open_counts
from atlas.ingest.study import Reading, open_study


def read_all(source: Any, **options: Any) -> None:
    with open_counts(source, **options) as opened:
        for _ in opened.blocks():
            pass


def spoiled(value: float, form: Callable[[Any], Any] = sp.csr_matrix) -> anndata.AnnData:
    """Counts with one bad value: row cell7, gene G3."""
    adata = small_study()
    dense = adata.X.toarray().astype(np.float64)
    dense[7, 3] = value
    adata.X = form(dense)
    return adata


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1.37, "holds fractions"),
        (-2.0, "holds negative values"),
        (np.nan, "holds values that are not finite"),
        (np.inf, "holds values that are not finite"),
        (2.0**32, r"holds values of 2\^32 or more"),
    ],
)
def test_what_is_not_a_count_is_named(tmp_path: Path, form: Any, value: float, reason: str) -> None:
    adata = spoiled(value, form)
    adata.write_h5ad(tmp_path / "x.h5ad")
    message = rf"^X {reason}\n  found: value {value} at row cell7, gene G3\n  expected: raw counts"
    with pytest.raises(CountsError, match=message):
        read_all(adata, memory=2_000)
    with pytest.raises(CountsError, match=message) as caught:
        read_all(tmp_path / "x.h5ad", memory=2_000)
    assert caught.value.path == tmp_path / "x.h5ad"
    assert caught.value.do is not None


def test_the_largest_count_is_a_count() -> None:
    adata = spoiled(2.0**32 - 1)
    with open_counts(adata) as source:
        assert read_counts(source)[7, 3] == 2**32 - 1


def test_duplicates_that_sum_to_too_much_are_refused() -> None:
    adata = small_study()
    matrix = sp.csr_matrix(adata.shape, dtype=np.float64)
    matrix.indptr = np.full(adata.n_obs + 1, 2)
    matrix.indptr[:8] = 0
    matrix.indices, matrix.data = np.array([3, 3]), np.full(2, 2.0**31)
    adata.X = matrix
    with pytest.raises(CountsError, match="row cell7, gene G3"):
        read_all(adata)


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()])
@pytest.mark.parametrize(
    ("place", "options", "advice"),
    [
        ("raw", {}, r"raw\.X holds counts: add --use-raw"),
        ("layer", {}, r"layers\['counts'\] holds counts: add --layer counts"),
        ("X", {"layer": "log"}, "X holds counts: leave out --layer and --use-raw"),
        ("nowhere", {}, r"what to do: give the file that holds the raw counts; these look norm"),
    ],
)
def test_the_place_that_holds_counts_is_named(
    tmp_path: Path, place: str, options: dict[str, str], advice: str, form: Any, in_file: bool
) -> None:
    adata = small_study()
    counts, log = form(adata.X), form(adata.X.log1p())
    adata.X = counts if place in ("raw", "X") else log
    if place == "raw":
        adata.raw = adata.copy()
    adata.X = counts if place == "X" else log
    adata.layers["log"] = log
    if place == "layer":
        adata.layers["counts"] = counts
    source: Any = adata
    if in_file:
        source = tmp_path / "x.h5ad"
        adata.write_h5ad(source)
    with pytest.raises(CountsError, match=advice) as caught:
        read_all(source, **options)
    assert str(caught.value).count("holds counts") == (place != "nowhere")


@pytest.mark.parametrize(
    ("change", "offered"),
    [
        (lambda x: x + 0.001, True),  # noise of arithmetic
        (lambda x: x + 0.3 * (np.arange(x.size) % 3 == 0), True),  # some estimates have fractions
        (lambda x: 40.3 * x, True),
        (lambda x: np.log1p(1e4 * x / 3000), False),
        (lambda x: np.log2(x + 1.1), False),
        (lambda x: x / 7, False),
    ],
)
def test_rounding_is_offered_for_estimates_only(
    change: Callable[[Any], Any], offered: bool
) -> None:
    adata = small_study()
    adata.X.data = change(adata.X.data.astype(np.float64))
    with pytest.raises(CountsError, match="holds fractions") as caught:
        read_all(adata)
    assert ("--round" in str(caught.value)) == offered
    assert ("which rounding does not undo" in str(caught.value)) != offered


def test_rounding_that_moves_much_of_the_counts_is_warned_of(tmp_path: Path) -> None:
    adata = small_study()
    adata.X.data = adata.X.data.astype(np.float64)
    log = adata.copy()
    log.X = log.X.log1p()
    log.obs_names = [f"log{i}" for i in range(log.n_obs)]
    adata.X.data += 0.001
    rounding = Reading(round_counts=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_study(adata, rounding).close()
    log.write_h5ad(tmp_path / "log.h5ad")
    adata.write_h5ad(tmp_path / "counts.h5ad")
    for sources in (log, [tmp_path / "counts.h5ad", tmp_path / "log.h5ad"]):
        with pytest.warns(UserWarning, match=r"Rounding moves .* by \d\d% of their sum") as told:
            open_study(sources, rounding).close()
        assert len(told) == 1


def test_rounding_is_half_to_even_and_still_refuses_the_rest() -> None:
    adata = small_study()
    values = np.zeros(adata.shape)
    values[0, :5] = [0.5, 1.5, 2.5, 0.4, 7.0]
    adata.X = sp.csr_matrix(values)
    with open_counts(adata, round_counts=True) as source:
        assert_same(read_counts(source), np.rint(values))
    for bad in (-0.2, np.nan, 2.0**32):
        with pytest.raises(CountsError):
            read_all(spoiled(bad), round_counts=True)


def write(path: Path, change: Callable[[h5py.File], None] | None = None) -> Path:
    small_study().write_h5ad(path)
    if change is not None:
        with h5py.File(path, "r+") as file:
            change(file)
    return path


def replace(key: str, change: Callable[[Any], Any]) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        values, attributes = file[key][()], dict(file[key].attrs)
        del file[key]
        file[key] = change(values)
        file[key].attrs.update(attributes)

    return apply


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist\n  found: no such file"):
        open_counts(tmp_path / "x.h5ad")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        open_counts(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").touch()
    with pytest.raises(InputError, match=r"is empty\n  found: 0 bytes\n.*\n.*download it again"):
        open_counts(tmp_path / "x.h5ad")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "x.h5ad")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=r"is damaged\n  found: .*truncated file"):
        read_all(path)


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").write_text("cell,gene\n1,2\n")
    with pytest.raises(
        InputError, match="not an HDF5 file\n  found: a file that starts with b'cel"
    ):
        open_counts(tmp_path / "x.h5ad")


def test_another_kind_of_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["table"] = 1
    with pytest.raises(
        InputError, match=r"neither an AnnData nor a 10x or loom file\n.*with table"
    ):
        open_counts(tmp_path / "x.h5")


def test_a_damaged_chunk(tmp_path: Path) -> None:
    adata = small_study(n_obs=2_000, n_vars=50)
    path = tmp_path / "x.h5ad"
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path, "r") as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(b"\xff" * chunk.size)
    with pytest.raises(InputError, match="a part of /X/data cannot be read"):
        read_all(path)


def test_a_missing_layer_lists_those_there(tmp_path: Path) -> None:
    adata = small_study()
    adata.layers["spliced"] = adata.X
    adata.write_h5ad(tmp_path / "x.h5ad")
    for source in (adata, tmp_path / "x.h5ad"):
        with pytest.raises(MissingColumnError, match="no layer 'counts'\n  found: 'spliced'"):
            open_counts(source, layer="counts")
        with open_counts(source) as opened, pytest.raises(MissingColumnError, match="'spliced'"):
            next(opened.layer_blocks("velocity"))


def test_a_missing_raw(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5ad")
    for source in (small_study(), path):
        with pytest.raises(InputError, match=r"has no raw\n  found: no raw\.X"):
            open_counts(source, use_raw=True)


def test_layer_and_raw_contradict() -> None:
    with pytest.raises(ConfigError, match="both asked for"):
        open_counts(small_study(), layer="counts", use_raw=True)


def test_duplicate_row_names(tmp_path: Path) -> None:
    adata = small_study()
    adata.obs_names = ["a", "a", "a", "b", "b", *map(str, range(35))]
    adata.write_h5ad(tmp_path / "x.h5ad")
    for source in (adata, tmp_path / "x.h5ad"):
        with pytest.raises(
            InputError, match="not unique\n  found: 2 names that occur more than once: a, b\n"
        ):
            open_counts(source)


def test_duplicate_gene_names_are_made_unique_as_anndata_does(tmp_path: Path) -> None:
    adata = small_study()
    adata.var_names = ["a", "a", "a-1", "a", *map(str, range(8))]
    adata.write_h5ad(tmp_path / "x.h5ad")
    with pytest.warns(UserWarning, match=r"1 gene names of .*x\.h5ad occur more than once \(a\)"):
        source = open_counts(tmp_path / "x.h5ad")
    with source, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.var_names_make_unique()
        assert list(source.var.index) == list(adata.var_names)


@pytest.mark.parametrize("index", [(slice(0, 0), slice(None)), (slice(None), slice(0, 0))])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()])
def test_nothing_in_it(tmp_path: Path, index: Any, form: Any) -> None:
    adata = small_study()
    adata.X = form(adata.X)
    adata = adata[index].copy()
    adata.write_h5ad(tmp_path / "x.h5ad")
    for source in (adata, tmp_path / "x.h5ad"):
        with pytest.raises(
            InputError, match=f"is empty\n  found: {adata.n_obs} rows × {adata.n_vars}"
        ):
            open_counts(source)


def test_tables_that_disagree_with_the_counts(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        file["X"].attrs["shape"] = np.array([40, 13])

    path = write(tmp_path / "x.h5ad", change)
    with pytest.raises(
        InputError, match=r"disagree in shape\n  found: 40 × 13 values\n.*40 rows.*12"
    ):
        open_counts(path)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (replace("X/indices", lambda x: x + np.int32(12)), "index 23\n"),
        (replace("X/indices", lambda x: x - np.int32(1)), "index -1\n"),
        (replace("X/indptr", lambda x: x[::-1]), "does not rise from 0"),
        (replace("X/indptr", lambda x: x[:-1]), "40 pointers for 40 rows"),
        (replace("X/data", lambda x: x[:-1]), "an indptr that ends at"),
        (lambda file: file["X"].__delitem__("indices"), "a sparse matrix without indices"),
    ],
)
def test_a_sparse_matrix_that_is_not_one(tmp_path: Path, change: Any, found: str) -> None:
    with pytest.raises(InputError, match=f"(?s)found: .*{found}"):
        read_all(write(tmp_path / "x.h5ad", change))


def test_row_indices_of_columns_out_of_range(tmp_path: Path) -> None:
    adata = small_study()
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        file["X/indices"][3] = 40
    with pytest.raises(InputError, match="found: index 40\n  expected: indices from 0 to 39"):
        read_all(tmp_path / "x.h5ad")


def test_a_damaged_table(tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        del file["obs/score"]

    with pytest.raises(InputError, match=r"obs of .* cannot be read\n  found: KeyError"):
        open_counts(write(tmp_path / "x.h5ad", change))


def test_a_damaged_layer_only_matters_where_it_is_read(tmp_path: Path) -> None:
    adata = small_study()
    adata.layers["short"] = adata.X
    adata.layers["text"] = adata.X
    adata.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        replace("layers/text/data", lambda x: x.astype("S4"))(file)
        file["layers/short"].attrs["shape"] = np.array([40, 13])
        file["X/data"][0] = 0.5
    with open_counts(tmp_path / "x.h5ad", round_counts=True) as source:
        assert read_counts(source).shape == adata.shape
        with pytest.raises(InputError, match=r"layers\['short'\] and the tables .* disagree"):
            next(source.layer_blocks("short"))
        with pytest.raises(InputError, match=r"layers\['text'\] does not hold numbers"):
            next(source.layer_blocks("text"))
    with pytest.raises(CountsError, match=r"value 0\.5 at row"):
        read_all(tmp_path / "x.h5ad")


def test_values_that_are_not_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5ad", replace("X/data", lambda x: x.astype("S4")))
    with pytest.raises(InputError, match=r"X does not hold numbers\n  found: \|S4"):
        open_counts(path)


def test_a_file_is_free_again_after_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5ad")
    with pytest.raises(MissingColumnError):
        open_counts(path, layer="none")
    with h5py.File(path, "r+") as file:  # HDF5 refuses to write where a reader is open
        assert "X" in file
