import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cl_lib import InputError
from cl_lib.replay import buffers
from cl_lib.seeds import Bag

from helpers import draws, rng


def filled(capacity, items, batch, seed, first=0):
    """A one-seed reservoir that was offered the numbers first … first+items−1, and those it holds."""
    buffer = buffers.empty(capacity, 1, torch.zeros(2), y=torch.tensor(0))
    random = draws(seed)
    for start in range(0, items, batch):
        y = torch.arange(start, min(start + batch, items)) + first
        buffers.reservoir_insert(buffer, random, x=torch.stack([y, -y], -1)[None].float(), y=y[None])
    return buffer


def held(buffer):
    return buffer.y[0, : int(buffers.filled(buffer)[0])]


@given(capacity=st.integers(0, 12), items=st.integers(0, 40), batch=st.integers(1, 9), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_reservoir_holds_genuine_items_once_and_aligned(capacity, items, batch, seed):
    buffer = filled(capacity, items, batch, seed)
    y = held(buffer)
    assert len(y) == min(items, capacity) == len(set(y.tolist()))
    assert set(y.tolist()) <= set(range(items))
    x = buffer.x[0, : len(y)]
    torch.testing.assert_close(x, torch.stack([y, -y], -1).float())
    if capacity >= items:
        assert y.tolist() == list(range(items))


@pytest.mark.parametrize("batch", [1, 7])
def test_reservoir_keeps_every_item_equally_often(batch):
    """The mean rate is M/N for the two off-by-one variants too: compare the first M items with the rest."""
    M, N, runs = 5, 20, 6000 if batch > 1 else 3000
    counts = torch.zeros(N)
    buffer = buffers.empty(M, runs, torch.zeros(0), y=torch.tensor(0))  # every run is a seed
    random = draws(*range(runs))
    for start in range(0, N, batch):
        y = torch.arange(start, min(start + batch, N)).expand(runs, -1)
        buffers.reservoir_insert(buffer, random, x=torch.zeros(*y.shape, 0), y=y)
    counts += torch.bincount(buffer.y[:, :M].flatten(), minlength=N)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    first, rest = counts[:M].sum() / (M * runs), counts[M:].sum() / ((N - M) * runs)
    expected = M / N
    for wrong in ((M + 1) / (N + 1), (M - 1) / (N - 1)):  # what drawing n+2 or n values gives the first M items
        assert abs(first - expected) < abs(first - wrong) / 2
    assert abs(rest - expected) < 0.01


def test_the_later_of_two_items_in_one_slot_stays():
    drawn = draws(*range(200)).uniform(30)
    of_all = buffers.reservoir_slots(torch.full((200,), 3), torch.ones(200, 30, dtype=torch.bool), 3, drawn)
    for slots, own in zip(of_all, drawn, strict=True):
        kept = slots[slots < 3]
        assert len(kept) == len(kept.unique())
        wanted = (own * torch.arange(4, 34)).long()
        for slot in kept.unique():
            assert (slots == slot).nonzero().max() == (wanted == slot).nonzero().max()


@given(
    seen=st.integers(0, 9), capacity=st.integers(0, 6), offered=st.lists(st.booleans(), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_slots_are_algorithm_r_one_sample_after_the_other(seen, capacity, offered, seed):
    drawn = draws(seed).uniform(len(offered))
    slots = buffers.reservoir_slots(torch.tensor([seen]), torch.tensor([offered]), capacity, drawn)[0].tolist()
    held, n = {}, seen
    for i, (own, u) in enumerate(zip(offered, drawn[0].tolist(), strict=True)):
        if own:
            slot = n if n < capacity else int(u * (n + 1))
            if slot < capacity:
                held[slot] = i
            n += 1
    assert {slot: i for i, slot in enumerate(slots) if slot < capacity} == held


@given(items=st.integers(0, 20), count=st.integers(1, 15), capacity=st.integers(1, 12), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_draw_is_without_replacement_and_of_fixed_shape(items, count, capacity, seed):
    drawn = buffers.draw(buffer := filled(capacity, items, 4, seed), count, draws(seed))
    if items == 0:
        assert drawn is None
        return
    y, there = drawn.y[0].tolist(), held(buffer).tolist()
    assert len(y) == min(count, capacity) and set(y) <= set(there)
    times = torch.tensor([y.count(v) for v in there])
    assert times.max() - times.min() <= 1


def test_draw_is_uniform():
    buffer = filled(10, 10, 5, 0)
    random, counts = draws(3), torch.zeros(10)
    for _ in range(2000):
        counts[buffers.draw(buffer, 3, random).y[0]] += 1
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_seeds_do_not_see_each_other():
    both = buffers.empty(4, 2, torch.zeros(1), y=torch.tensor(0))
    random = draws(0, 1)
    for start in range(0, 30, 5):
        y = torch.arange(start, start + 5)
        buffers.reservoir_insert(both, random, x=y.expand(2, 5)[..., None].float(), y=y.expand(2, 5))
    for s in range(2):
        alone = buffers.empty(4, 1, torch.zeros(1), y=torch.tensor(0))
        random = draws(s)
        for start in range(0, 30, 5):
            y = torch.arange(start, start + 5)
            buffers.reservoir_insert(alone, random, x=y[None, :, None].float(), y=y[None])
        torch.testing.assert_close(both.y[s, :4], alone.y[0, :4])


@given(M=st.integers(4, 30), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_balanced_buffer_gives_equal_shares(M, sizes, seed):
    """Tasks bring one class each, of the given sizes."""
    buffer = Bag(x=torch.zeros(M + 1, 1), y=torch.zeros(M + 1, dtype=torch.long), seen=torch.tensor(0))
    before = []
    for c, n in enumerate(sizes):
        y, x = torch.full((n,), c), torch.arange(n)[:, None].float()
        buffer = buffers.keep_balanced(buffer, buffer.y, y, rng(seed), x=x, y=y)
        kept = buffer.y[: int(buffer.seen)]
        quota = M // (c + 1)
        for k in range(c + 1):
            assert (kept == k).sum() == min(quota, sizes[k], *(M // (j + 1) for j in range(k, c)))
        now = [buffer.x[: int(buffer.seen)][kept == k].flatten().tolist() for k in range(c)]
        assert all(new == old[: len(new)] for new, old in zip(now, before, strict=False)), (
            "old classes keep their first"
        )
        before = [buffer.x[: int(buffer.seen)][kept == k].flatten().tolist() for k in range(c + 1)]


def test_what_cannot_be_kept():
    with pytest.raises(InputError, match="memory=-1"):
        buffers.empty(-1, 1, torch.zeros(1))
    buffer = Bag(x=torch.zeros(3, 1), y=torch.zeros(3, dtype=torch.long), seen=torch.tensor(0))
    y = torch.arange(3)
    with pytest.raises(InputError, match="memory=2 cannot hold"):
        buffers.keep_balanced(buffer, buffer.y, y, rng(), x=y[:, None].float(), y=y)


def test_size_counts_the_rows_that_can_be_read():
    buffer = buffers.empty(10, 3, torch.zeros(1, 8, 8), y=torch.tensor(0))
    assert buffers.size(buffer) == 10 * (64 * 4 + 8)


def test_a_draw_among_some_rows_takes_each_of_them_before_any_twice():
    buffer = filled(8, 8, 4, 0)
    among = torch.tensor([[False, True, True, False, True, False, False, False, False]])
    y = buffers.draw(buffer, 7, draws(1), among).y[0].tolist()
    there = buffer.y[0, [1, 2, 4]].tolist()
    assert set(y) == set(there) and sorted(y[:3]) == sorted(y[3:6]) == sorted(there) and y[6] == y[0]
