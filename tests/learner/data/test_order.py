"""Orders: permutations of all rows, different each epoch; torch's, bit by bit."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from learner.data.epochs import ListEpochs
from learner.data.order import buffered_shuffle, epoch_order, torch_randperm
from learner.data.prompts import Prompt
from protocol.config.settings import DataSettings
from protocol.errors import DataError

GOLDEN = Path(__file__).parents[2] / "parity" / "tokens" / "randperm.json"
REPEATED = GOLDEN.with_name("repeat_sampler.json")


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"])
def test_torch_randperm_is_torchs(case):
    order = torch_randperm(case["count"], case["seed"])
    assert order[:40].tolist() == case["head"]
    assert hashlib.sha256(order.astype("<i4").tobytes()).hexdigest() == case["sha256"]


def test_torch_order_of_an_epoch_is_seeded_by_seed_and_epoch():
    assert np.array_equal(
        epoch_order("torch_randperm", 32, seed=42, epoch=1), torch_randperm(32, 43)
    )


def prompts(count):
    return [Prompt(number, [2], {}) for number in range(count)]


@pytest.mark.parametrize("case", json.loads(REPEATED.read_text())["cases"])
def test_prompts_follow_trls_repeat_sampler_over_epochs(case):
    epochs = ListEpochs(
        prompts(case["count"]),
        DataSettings(order="torch_randperm"),
        seed=case["seed"],
        batch_size=case["batch_size"],
        repeat_sampler=True,
    )
    for wanted in case["epochs"]:
        order = [prompt.row_key for prompt in iter(epochs.next, None)]
        assert order[:40] == wanted["head"]
        assert len(order) == wanted["count"] == epochs.size
        digest = hashlib.sha256(np.asarray(order, "<i4").tobytes()).hexdigest()
        assert digest == wanted["sha256"]


def test_fewer_rows_than_a_batch_are_refused_in_that_order():
    with pytest.raises(DataError, match=r"3 rows are fewer than train\.batch_size = 4"):
        ListEpochs(
            prompts(3),
            DataSettings(order="torch_randperm"),
            seed=0,
            batch_size=4,
            repeat_sampler=True,
        )


@pytest.mark.parametrize("order", ["shuffled", "length_grouped", "torch_randperm"])
def test_epochs_are_different_permutations_that_a_seed_repeats(order):
    def make(seed, epoch):
        lengths = [7 * index % 31 for index in range(103)]
        return epoch_order(order, 103, seed=seed, epoch=epoch, lengths=lengths, batch_size=4)

    first = make(5, 0)
    assert sorted(first.tolist()) == list(range(103))
    assert np.array_equal(first, make(5, 0))
    assert not np.array_equal(first, make(5, 1))
    assert not np.array_equal(first, make(6, 0))


def test_sequential_follows_the_file():
    assert epoch_order("sequential", 4, seed=1, epoch=3).tolist() == [0, 1, 2, 3]


def test_length_grouping_groups_without_putting_the_shortest_first():
    lengths = list(range(400))
    order = epoch_order("length_grouped", 400, seed=0, epoch=0, lengths=lengths, batch_size=8)
    batches = order.reshape(-1, 8)
    assert max(np.ptp(batch) for batch in batches) == 7  # one mega-batch: neighbours
    assert batches[:10].mean() == pytest.approx(199.5, abs=60)


def test_a_buffered_shuffle_holds_its_buffer_and_loses_nothing():
    read = itertools.count()
    source = (next(read) for _ in range(1000))
    shuffled = buffered_shuffle(source, 50, seed=1, epoch=0)
    head = [next(shuffled) for _ in range(100)]
    assert next(read) == 150  # 50 held, 100 given
    assert max(head) < 150
    items = list(buffered_shuffle(iter(range(1000)), 50, seed=1, epoch=0))
    assert sorted(items) == list(range(1000))
    assert items != list(buffered_shuffle(iter(range(1000)), 50, seed=1, epoch=1))
