"""Batches: every sample at most once per epoch, and every batch a function of the seed and the step."""

import traceback
from itertools import chain, product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from scoresde.data import ImageFolder
from scoresde.data.items import Unreadable
from scoresde.training.batches import REPLACEMENTS, StepNoise, batches, fitting, split_condition, step_seed

SEEDS = [0, 1, 2, 20240101, 2**31 - 1]


def indices(size, batch_size, seed, start, stop):
    """The indices in the batches of a dataset of this size."""
    return [batch.tolist() for batch in batches(torch.arange(size), batch_size, seed, start, stop)]


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 3), (5, 5), (3, 1)])
def test_an_epoch_has_every_sample_at_most_once(size, batch_size):
    per_epoch = size // batch_size
    steps = indices(size, batch_size, 0, 0, 4 * per_epoch)
    assert {len(batch) for batch in steps} == {batch_size}
    epochs = [list(chain(*steps[i : i + per_epoch])) for i in range(0, len(steps), per_epoch)]
    for epoch in epochs:
        assert len(set(epoch)) == per_epoch * batch_size
        assert set(epoch) <= set(range(size))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_samples_left_out_change_from_epoch_to_epoch():
    assert {(set(range(10)) - set(batch)).pop() for batch in indices(10, 9, 0, 0, 50)} == set(range(10))


@pytest.mark.parametrize("start", [0, 1, 3, 11])
def test_batches_from_any_step_on_are_those_of_the_whole_run(start):
    whole = indices(13, 4, 7, 0, 12)
    loader = batches(torch.arange(13), 4, 7, start, 12)
    assert len(loader) == 12 - start
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == whole[start:]


def test_the_order_depends_on_the_seed():
    assert len({tuple(chain(*indices(100, 10, seed, 0, 10))) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_with_random_draws_do_not_depend_on_workers_or_the_first_step(workers):
    """Of an item and a draw from PyTorch's global generator."""

    class Random(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return torch.full((2,), index), torch.rand(())

    whole = list(batches(Random(), 4, 3, 0, 6))
    for (x, draw), (expected, drawn) in zip(batches(Random(), 4, 3, 2, 6, workers), whole[2:], strict=True):
        assert torch.equal(x, expected)
        assert torch.equal(draw, drawn)
    assert len(torch.cat([draw for _, draw in whole]).unique()) == 6 * 4


def test_draws_differ_between_seeds_and_steps():
    pairs = list(product(SEEDS, [0, 1, 2, 1000]))
    draws = {
        float(torch.rand(1, generator=torch.Generator().manual_seed(step_seed(*pair)), dtype=torch.float64))
        for pair in pairs
    }
    assert len(draws) == len(pairs)


KINDS = ("normal", "uniform", "rademacher", "normal")


def step_draws(positions, seed=0, step=3, rows=None, dtype=torch.float32, shape=(3,)):
    """One draw after the other for some positions of a batch."""
    stream, like = StepNoise(positions, seed, step), torch.empty(len(positions), *shape, dtype=dtype)
    like = like if rows is None else like[rows]
    return [getattr(stream, kind)(like, rows) for kind in KINDS]


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, (3,)), (torch.float64, (2, 2))], ids=str)
@pytest.mark.parametrize("positions", [range(1), range(2, 5), range(5, 7), range(6, 7)], ids=str)
def test_a_position_draws_the_same_in_any_part_of_its_batch(positions, dtype, shape):
    """Also if only some rows of the part draw; and all draws are different."""
    whole = step_draws(range(7), dtype=dtype, shape=shape)
    rows = torch.arange(0, len(positions), 2)
    part, part_rows = (step_draws(positions, rows=chosen, dtype=dtype, shape=shape) for chosen in (None, rows))
    for draw, of_rows, expected in zip(part, part_rows, whole, strict=True):
        assert torch.equal(draw, expected[positions.start : positions.stop])
        assert torch.equal(of_rows, expected[positions.start : positions.stop][rows])
    normal = torch.stack([whole[0], whole[3]])
    assert len(normal.unique()) == normal.numel()


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 4}], ids=str)
def test_another_step_or_seed_draws_other_noise(other):
    draws, others = step_draws(range(7)), step_draws(range(7), **other)
    assert not any(bool((x == y).any()) for x, y in zip(draws[:2], others[:2], strict=True))
    assert not torch.equal(draws[2], others[2])


@pytest.mark.parametrize("batch_size", [0, 11])
def test_refuses_a_batch_that_cannot_be_filled(batch_size):
    with pytest.raises(ValueError, match=f"1 .processes. and 10 .samples.; got {batch_size}"):
        batches(torch.arange(10), batch_size, 0, 0, 1)


def test_splits_a_batch_into_state_and_condition():
    x, label = torch.zeros(4, 2), torch.arange(4)
    assert split_condition(x, "cpu") == (x, None)
    for pair in ((x, label), [x, label], (x, {"label": label})):
        state, cond = split_condition(pair, "cpu")
        assert state is x
        assert (cond["label"] if isinstance(cond, dict) else cond) is label
        moved = split_condition(pair, "meta")[1]
        assert (moved["label"] if isinstance(moved, dict) else moved).device.type == "meta"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(2)}, r"must be a tensor or \(tensor, condition\); got dict"),
        ("x", "got str"),
        ([torch.zeros(2)] * 3, "got list"),
        ([torch.zeros(2, 3), ("cat", "dog")], "a condition must be a tensor or a dict of tensors; got tuple"),
        ([torch.zeros(2, 3), [torch.ones(2)] * 2], "got list"),
        ([torch.zeros(2, 3), {"name": ["cat", "dog"]}], "got list"),
    ],
)
def test_refuses_other_batches(batch, message):
    with pytest.raises(TypeError, match=message):
        split_condition(batch, "cpu")


def test_a_batch_is_at_most_the_dataset_and_this_is_told():
    assert fitting(10, torch.arange(10)) == 10
    message = "^batch_size=256 is larger than the dataset: every batch has all 160 samples$"
    with pytest.warns(UserWarning, match=message):
        assert fitting(256, torch.arange(160)) == 160
    with pytest.raises(ValueError, match=r"1 \(processes\) and 0 \(samples\); got 4"):
        batches(torch.arange(0), fitting(4, torch.arange(0)), 0, 0, 1)


def folder(path, damaged):
    """A folder of 12 pictures of one colour, the level of which is ten times their number; some cut in half."""
    for i in range(12):
        Image.fromarray(np.full((4, 4), 10 * i, np.uint8)).save(path / f"{i:02}.png")
    for i in damaged:
        file = path / f"{i:02}.png"
        file.write_bytes(file.read_bytes()[:45])
    return ImageFolder(path, size=4, channels=1)


@pytest.mark.filterwarnings("always:item")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_and_the_next_item_takes_its_place(tmp_path, workers, recwarn):
    whole = [batch[:, 0, 0, 0] / 10 for batch in batches(folder(tmp_path, []), 4, 0, 0, 3)]
    loaded = [batch[:, 0, 0, 0] / 10 for batch in batches(folder(tmp_path, [5, 6]), 4, 0, 0, 3, workers)]
    replaced = [torch.where((batch == 5) | (batch == 6), 7.0, batch) for batch in whole]
    assert all(map(torch.equal, loaded, replaced))
    messages = {str(warning.message).partition(" (")[0] for warning in recwarn}  # those of workers are on stderr
    files = {5: tmp_path / "05.png", 6: tmp_path / "06.png"}
    assert workers or messages == {
        f"item {i} is left out, the next one is taken: {file} is not an image of 8 bits per channel, one frame and an "
        "accepted size"
        for i, file in files.items()
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:item")
def test_a_folder_of_damaged_files_is_refused_with_the_name_of_one(tmp_path, workers):
    dataset = folder(tmp_path, range(12))
    with pytest.raises(Unreadable, match=r"\d\d.png is not an image of 8 bits per channel") as refused:
        next(iter(batches(dataset, 4, 0, 0, 3, workers)))
    traceback.clear_frames(refused.tb)  # they form a cycle with the loader: garbage collection waits 5 s per worker
    assert REPLACEMENTS < 12
