"""Joining obs tables whose columns differ."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from atlas.errors import MissingColumnError
from atlas.store.tables import join_obs


def test_columns_of_every_kind_join_and_can_be_written(tmp_path: Path) -> None:
    one = pd.DataFrame(
        {
            "float": [1.5, np.nan],
            "integer": [2**60 + 1, 2],
            "boolean": [True, False],
            "category": pd.Categorical(["x", None], categories=["unused", "x"]),
            "clash": [1, 2],
            "widened": [1, 2],
            "only here": [7, 8],
        },
        index=["a", "b"],
    )
    two = pd.DataFrame(
        {
            "float": [2.5],
            "integer": [3],
            "category": pd.Categorical(["y"]),
            "clash": ["one"],
            "widened": [0.5],
            "late": [True],
        },
        index=["c"],
    )
    own = {"atlas_study": pd.Categorical(["s", "s", "t"])}
    joined = join_obs([one, two], own, None, tmp_path)
    assert list(joined.index) == ["a", "b", "c"]
    assert list(joined.columns) == [*one.columns, "late", "atlas_study"]
    np.testing.assert_array_equal(joined["float"], [1.5, np.nan, 2.5])
    assert list(joined["integer"]) == [2**60 + 1, 2, 3]
    assert joined["integer"].dtype == np.int64
    assert joined["boolean"].tolist() == [True, False, pd.NA]
    assert list(joined["category"].cat.categories) == ["unused", "x", "y"]
    assert joined["category"].isna().tolist() == [False, True, False]
    assert list(joined["clash"]) == ["1", "2", "one"]
    assert list(joined["widened"]) == [1, 2, 0.5]
    assert joined["only here"].isna().tolist() == [False, False, True]
    assert joined["only here"].dtype == "Int64"
    AnnData(np.zeros((3, 1), np.float32), obs=joined).write_h5ad(tmp_path / "out.h5ad")
    back = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert back["late"].tolist() == [pd.NA, pd.NA, True]
    assert list(back["clash"]) == ["1", "2", "one"]
    with pytest.raises(MissingColumnError, match="'nope'"):
        join_obs([one, two], own, ["float", "nope"], tmp_path)


def test_an_input_column_is_never_hidden_by_the_stores_own(tmp_path: Path) -> None:
    one = pd.DataFrame({"atlas_study": ["theirs"]}, index=["a"])
    own = {"atlas_study": pd.Categorical(["ours"])}
    assert list(join_obs([one], own, None, tmp_path)["atlas_study"]) == ["theirs"]


def test_an_error_lists_a_dozen_of_many_columns_the_likely_ones_first(tmp_path: Path) -> None:
    frame = pd.DataFrame({f"column {i}": [i] for i in range(30)} | {"cell_type": ["B"]})
    with pytest.raises(MissingColumnError) as refused:
        join_obs([frame], {}, ["celltype"], tmp_path)
    said = str(refused.value.expected)
    assert said.startswith("one of cell_type, column 0, column 1, ")
    assert said.endswith(", … (31 in all)")
    assert said.count(",") == 12
    with pytest.raises(MissingColumnError) as refused:
        join_obs([frame.iloc[:, :12]], {}, ["celltype"], tmp_path)
    assert str(refused.value.expected) == "one of " + ", ".join(frame.columns[:12])
