"""The gene table and how studies meet in it."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.errors import InputError
from atlas.ingest import GeneIdentity, GeneTable, align

A, B, C, D = (f"ENSG0000000000{i}" for i in range(4))


def genes(names: list[str], ids: list[str | None] | None = None) -> pd.DataFrame:
    columns = {} if ids is None else {"gene_ids": ids}
    return pd.DataFrame(columns, index=names)


def test_identity_from_symbols_beside_ids() -> None:
    found = GeneIdentity.from_var(genes(["X", "Y", "Z"], [f"{A}.12", "FBgn0001", B]))
    assert found.names == ("X", "Y", "Z")
    assert found.ids == (A, None, B)


def test_identity_from_ids_in_the_index() -> None:
    var = pd.DataFrame(
        {"feature_name": pd.Categorical(["X", None, B])}, index=[f"{A}.3", B, "ENSMUSG00000000007"]
    )
    found = GeneIdentity.from_var(var)
    assert found.names == ("X", B, "ENSMUSG00000000007")
    assert found.ids == (A, B, "ENSMUSG00000000007")


def test_identity_from_numbered_rows() -> None:
    var = pd.DataFrame({"feature_id": [A, B], "feature_name": ["X", "Y"]}, index=["0", "1"])
    found = GeneIdentity.from_var(var)
    assert found == GeneIdentity(("X", "Y"), (A, B))


@pytest.mark.parametrize("column", ["gene_ids", "gene_id", "ensembl_id", "ensembl", "feature_id"])
def test_id_columns(column: str) -> None:
    assert GeneIdentity.from_var(pd.DataFrame({column: [A]}, index=["X"])).ids == (A,)


@pytest.mark.parametrize(
    "column", ["gene_symbols", "gene_symbol", "gene_name", "gene_names", "feature_name", "symbol"]
)
def test_symbol_columns(column: str) -> None:
    assert GeneIdentity.from_var(pd.DataFrame({column: ["X"]}, index=[A])).names == ("X",)


@pytest.mark.parametrize(
    "name", ["ENSG1", "ENST00000000001", "ENSG00000000001.", "xENSG00000000001"]
)
def test_what_is_no_gene_id(name: str) -> None:
    assert GeneIdentity.from_var(genes([name])).ids == (None,)


def test_the_first_study_makes_the_table() -> None:
    table, columns, report = align(GeneTable(), genes(["X", "Y"], [A, None]))
    assert table == GeneTable(("X", "Y"), (A, None))
    assert columns.dtype == np.int32
    assert columns.tolist() == [0, 1]
    assert (report.n_by_id, report.n_by_symbol, report.n_new) == (0, 0, 2)


def test_by_id_whatever_the_symbol_and_version() -> None:
    table = GeneTable(("X", "Y"), (A, B))
    new, columns, report = align(table, genes(["renamed", "Y"], [f"{B}.7", f"{A}.1"]))
    assert new == table
    assert columns.tolist() == [1, 0]
    assert report.n_by_id == 2


def test_by_symbol_where_one_side_has_no_id_and_the_id_is_kept() -> None:
    new, columns, report = align(GeneTable(("X", "Y"), (None, B)), genes(["Y", "X"], [None, A]))
    assert columns.tolist() == [1, 0]
    assert new == GeneTable(("X", "Y"), (A, B))
    assert report.n_by_symbol == 2


def test_never_by_symbol_where_ids_differ() -> None:
    table = GeneTable(("X", "Y"), (A, B))
    with pytest.warns(UserWarning, match="share a symbol with another gene of the table.*X as X-1"):
        new, columns, report = align(table, genes(["X", "Y"], [C, B]))
    assert new == GeneTable(("X", "Y", "X-1"), (A, B, C))
    assert columns.tolist() == [2, 1]
    assert report.renamed == (("X", "X-1"),)
    again, columns, _ = align(new, genes(["X", "Y"], [C, B]))
    assert again == new
    assert columns.tolist() == [2, 1]


def test_a_new_name_avoids_those_of_the_study() -> None:
    with pytest.warns(UserWarning, match="X as X-2"):
        new, columns, _ = align(GeneTable(("X", "Y"), (A, B)), genes(["X", "X-1", "Y"], [C, D, B]))
    assert new.names == ("X", "Y", "X-2", "X-1")
    assert columns.tolist() == [2, 3, 1]


def test_one_gene_of_the_table_takes_one_of_the_study() -> None:
    table = GeneTable(("X", "Y"), (A, None))
    with pytest.warns(UserWarning, match="X as X-1"):
        new, columns, _ = align(table, genes(["other", "X", "Y"], [A, None, None]))
    assert columns.tolist() == [0, 2, 1]
    assert new.names == ("X", "Y", "X-1")


def test_repeated_ids_and_names_are_kept_apart_and_meet_again() -> None:
    study = genes(["X", "X", "Y"], [A, A, B])
    with pytest.warns(UserWarning, match="1 gene names and 1 Ensembl ids repeat"):
        table, columns, _ = align(GeneTable(), study)
    assert table == GeneTable(("X", "X-1", "Y"), (A, None, B))
    assert columns.tolist() == [0, 1, 2]
    with pytest.warns(UserWarning, match="repeat"):
        again, columns, _ = align(table, study)
    assert again == table
    assert columns.tolist() == [0, 1, 2]


def test_a_fixed_table_drops_what_it_does_not_have() -> None:
    table = GeneTable(("X", "Y"), (A, B))
    new, columns, report = align(table, genes(["Z", "Y", "X"], [D, B, C]), mode="fixed")
    assert new == table
    assert columns.tolist() == [-1, 1, -1]
    assert report.n_dropped == 2


def test_nothing_in_common_suggests_ids_against_symbols() -> None:
    table = GeneTable(("X", "Y"), (None, None))
    message = (
        rf"no gene in common.*\n  found: {A}, {B}\n  expected: some of X, Y.*\n"
        r".*Ensembl ids and the other symbols"
    )
    for mode in ("union", "fixed"):
        with pytest.raises(InputError, match=message):
            align(table, genes([A, B]), mode=mode)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="check the species"):
        align(table, genes(["x", "y"]))


def test_json_and_digest() -> None:
    table = GeneTable(("X", "Y"), (A, None))
    again = GeneTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again.digest == table.digest
    assert GeneTable(("Y", "X"), (None, A)).digest != table.digest
    assert GeneTable(("X", "Y"), (A, B)).digest != table.digest


def test_a_table_of_names() -> None:
    assert GeneTable.of_names(["X", f"{A}.2"]) == GeneTable(("X", f"{A}.2"), (None, A))
    with pytest.raises(InputError, match="more than once\n  found: X"):
        GeneTable.of_names(["X", "Y", "X"])


@pytest.mark.parametrize(
    ("names", "ids"), [(("X", "X"), (None, None)), (("X", "Y"), (A, A)), (("X",), (None, A))]
)
def test_a_table_must_be_consistent(names: tuple[str, ...], ids: tuple[str | None, ...]) -> None:
    with pytest.raises(ValueError, match=r"not unique|names for"):
        GeneTable(names, ids)


_study = st.lists(
    st.tuples(st.sampled_from("STUVWXYZ"), st.sampled_from([None, A, B, C, D, f"{A}.1"])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(studies=st.lists(_study, min_size=1, max_size=4))
def test_what_holds_for_any_studies(studies: list[list[tuple[str, str | None]]]) -> None:
    table = GeneTable(("shared",), (None,))
    for study in studies:
        names, ids = zip(("shared", None), *study, strict=True)
        var = genes(list(names), list(ids))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new, columns, report = align(table, var)
            repeated, columns_again, _ = align(new, var)
        # It only grows; positions stay; ids are only filled in.
        assert new.names[: len(table)] == table.names
        for old_id, new_id in zip(table.ids, new.ids, strict=False):
            assert old_id in (None, new_id)
        # Every gene has a place of its own, never one with another id.
        assert len(set(columns.tolist())) == len(names)
        assert (columns >= 0).all()
        for gene_id, column in zip(GeneIdentity.from_var(var).ids, columns, strict=True):
            assert gene_id is None or new.ids[column] in (None, gene_id)
        assert report.n_by_id + report.n_by_symbol + report.n_new == len(names)
        # The same study again adds nothing and finds the same places.
        assert repeated == new
        np.testing.assert_array_equal(columns_again, columns)
        table = new
