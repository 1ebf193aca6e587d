"""What may be given to the loaders, and what is said of the rest."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from loaders_helpers import source

from loaders import LoaderError, MinibatchLoader, SequentialLoader, TorchDataset, audit

pytestmark = pytest.mark.timeout(120)
SMALL = {"block_size": 8, "buffer_size": 64, "lanes": 4}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([3, 400], [3, 400]),
        ([1, 5, 9, 20], [1, 5, 9, 20]),
        ([7], [7]),
        ((2, 3, 4), [2, 3, 4]),
        (np.array([1, 2], np.uint16), [1, 2]),
        (range(5, 9), [5, 6, 7, 8]),
        ([(3, 6), (8, 9)], [3, 4, 5, 8]),
        (np.array([[3, 6]]), [3, 4, 5]),
        ([True, *[False] * 498, True], [0, 499]),
        (pd.Series(np.arange(500) == 4, index=[f"cell{i}" for i in range(500)]), [4]),
    ],
    ids=repr,
)
def test_rows_are_chosen_as_they_are_written(rows, expected):
    loaders = MinibatchLoader(source(), 20, rows=rows, **SMALL), SequentialLoader(source(), 5, rows)
    for loader in loaders:
        assert sorted(np.concatenate([m.rows for m in loader]).tolist()) == expected


@pytest.mark.parametrize(
    "rows",
    ["donor", slice(0, 100), [(1, 2), 3], [1.5, 2.0], [[1, 2, 3]], np.zeros((2, 2), bool), 7],
    ids=repr,
)
def test_other_ways_are_refused(rows):
    with pytest.raises(LoaderError, match="in a way that is not known"):
        MinibatchLoader(source(), 20, rows=rows, **SMALL)


@pytest.mark.parametrize("rows", [[5, 3], [3, 3], [-1], [499, 500]])
def test_row_numbers_that_do_not_fit_are_refused(rows):
    with pytest.raises(LoaderError, match="row numbers are out of order or out of range"):
        MinibatchLoader(source(), 20, rows=rows, **SMALL)


def test_a_mask_of_numbers_is_said_to_be_none_of_bool():
    mask = np.arange(500) % 2
    for dtype in (np.int8, np.uint8, np.int64):
        with pytest.raises(LoaderError, match="not one of bool") as caught:
            MinibatchLoader(source(), 20, rows=mask.astype(dtype), **SMALL)
        assert caught.value.found == f"{np.dtype(dtype)} (500,) of zeros and ones"
        assert "row numbers" in str(caught.value.expected)


@pytest.mark.parametrize("wrong", ["s.atlas", np.zeros((3, 3)), None])
def test_what_is_no_source_is_said_to_be_none(wrong):
    with pytest.raises(LoaderError, match="this is no source of rows"):
        MinibatchLoader(wrong, 20)


@pytest.mark.parametrize("wrong", [1.5, 1.0, "8192", True, np.True_, [1]], ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        *("minibatch_size", "seed", "block_size", "buffer_size", "lanes", "rank", "world_size"),
        *("threads", "rows_per_epoch"),
    ],
)
def test_what_is_no_whole_number_is_refused_by_name(name, wrong):
    with pytest.raises(LoaderError, match=f"{name} is no whole number") as caught:
        MinibatchLoader(source(), **{"weights": np.ones(500), name: wrong})
    assert caught.value.found == repr(wrong)


def test_an_epoch_that_is_no_whole_number_is_refused_and_nothing_changes():
    loader = MinibatchLoader(source(), 20, **SMALL)
    iterator = iter(loader)
    next(iterator)
    for wrong in (1.5, "1", None, True):
        with pytest.raises(LoaderError, match="epoch is no whole number"):
            loader.skip_to_epoch(wrong)
    next(iterator)
    assert (loader.epoch, loader.step) == (0, 2)
    with pytest.raises(LoaderError, match="seed is no whole number"):
        MinibatchLoader(source(), 20, None)


def test_numbers_that_are_none_are_refused_by_name():
    with pytest.raises(LoaderError, match="rows_per_epoch is out of range"):
        MinibatchLoader(source(), 20, weights=np.ones(500), rows_per_epoch=0, **SMALL)
    for state in (None, 3, "state", []):
        with pytest.raises(LoaderError, match="no state of a loader"):
            MinibatchLoader(source(), 20, **SMALL).load_state_dict(state)
    with pytest.raises(LoaderError, match="only a shuffling loader"):
        audit(SequentialLoader(source(), 20))


def test_a_loader_goes_to_another_process_with_its_position():
    loader = MinibatchLoader(source(), 20, weights=np.arange(500), **SMALL)
    iterator = iter(loader)
    next(iterator)
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.state_dict() == loader.state_dict()
    rest, others = list(iterator), list(copy)
    assert [m.rows.tolist() for m in rest] == [m.rows.tolist() for m in others]
    assert "20 rows × " in repr(rest[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_of_a_dataloader_gives_the_same_and_its_state_is_not_guessed(start):
    data = torch.utils.data.DataLoader(
        dataset := TorchDataset(MinibatchLoader(source(), 100, **SMALL)),
        batch_size=None,
        num_workers=1,
        multiprocessing_context=start,
    )
    plain = MinibatchLoader(source(), 100, **SMALL)
    for epoch in range(2):
        assert dataset.state_dict()["epoch"] == epoch
        seen = []
        for item in data:
            if not seen:
                with pytest.raises(LoaderError, match="in the midst of an epoch"):
                    dataset.state_dict()
            seen.append(item["rows"].tolist())
        assert seen == [m.rows.tolist() for m in plain]
    assert dataset.state_dict() == plain.state_dict()
    with pytest.raises(LoaderError, match="made of a loader"):
        TorchDataset(source())
