"""The loader: order, dropout, exact resume, shares of processes, bad examples, speed."""

import json
import threading
import time
import zipfile
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from PIL import Image

from taca_jax.data.config import DataConfig
from taca_jax.data.loader import make_loader
from taca_jax.data.shapes.captions import VOCABULARY
from taca_jax.data.sources.bad_examples import BadExampleError, BadExamples
from taca_jax.data.sources.factory import open_source
from taca_jax.errors import UserError
from tests.shared import shared_path

WORDS = {word: i for i, word in enumerate(VOCABULARY)}


def tokenize_words(captions):
    tokens = np.zeros((len(captions), 16), np.int32)
    for row, caption in zip(tokens, captions, strict=True):
        ids = [WORDS[word] for word in caption.split()]
        row[: len(ids)] = ids
    return tokens


def tokenize_length(captions):
    """Tokens from which the caption can be told: 0 for "", 42 for "41"."""
    return np.array([[int(caption or -1) + 1] * 2 for caption in captions], np.int64)


class Numbers:
    """Example i is a picture of i, captioned i; those in `bad` cannot be read."""

    def __init__(self, size, bad=(), max_bad_share=0.5):
        self.size = size
        self.broken = set(bad)
        self.bad = BadExamples(size, max_bad_share)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            self.bad.add_bad(index, f"{index}.png", "torn")
            raise BadExampleError("torn")
        self.bad.add_good(index)
        image = np.full((2, 2, 3), index % 256, np.uint8)
        return {"image": image, "caption": str(index), "id": str(index)}


def numbers_loader(source, batch_size=4, dropout=0.0, seed=0, rows=None):
    data = DataConfig(batch_size=batch_size, caption_dropout=dropout, seed=seed)
    return make_loader(source, data=data, tokenize=tokenize_length, rows=rows)


def take(loader, count):
    return list(islice(loader, count))


def ids(batches):
    return [int(name) for batch in batches for name in batch["id"]]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch["id"] == other["id"]
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])


def test_batches_hold_examples_and_their_tokens():
    source = open_source(DataConfig("generated:shapes/50"))
    data = DataConfig(batch_size=8, caption_dropout=0.0)
    with make_loader(source, data=data, tokenize=tokenize_words) as loader:
        batch = next(loader)
    assert batch["image"].shape == (8, 40, 40, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["tokens"].shape == (8, 16)
    assert batch["tokens"].dtype == np.int32
    by_id = {source[i]["id"]: source[i] for i in range(50)}
    for i, name in enumerate(batch["id"]):
        np.testing.assert_array_equal(batch["image"][i], by_id[name]["image"])
        np.testing.assert_array_equal(
            batch["tokens"][i], tokenize_words([by_id[name]["caption"]])[0]
        )


@pytest.mark.parametrize("size", [1, 3, 10, 64, 100, 257])
def test_every_epoch_holds_each_example_once_in_its_own_order(size):
    with numbers_loader(Numbers(size), batch_size=4) as loader:
        seen = ids(take(loader, -(-6 * size // 4)))[: 6 * size]
    epochs = [tuple(seen[i : i + size]) for i in range(0, 6 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 10:
        assert len(set(epochs)) == 6
        assert tuple(range(size)) not in epochs


def test_orders_are_fair():
    """Each of 3 examples stands at each place a third of the time, in independent epochs."""
    with numbers_loader(Numbers(3), batch_size=3) as loader:
        epochs = [tuple(ids([batch])) for batch in take(loader, 3000)]
    counts = Counter(epochs)
    assert len(counts) == 6
    assert max(abs(count - 500) for count in counts.values()) < 5 * 500**0.5
    pairs = Counter(pairwise(epochs))
    assert len(pairs) == 36


def test_a_source_of_bad_examples_alone_is_an_error():
    class Torn:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise BadExampleError("torn")

    with numbers_loader(Torn()) as loader, pytest.raises(UserError, match="are bad, and the log"):
        next(loader)


def test_a_batch_may_be_larger_than_the_source():
    with numbers_loader(Numbers(3), batch_size=8) as loader:
        batches = take(loader, 3)
    assert [batch["image"].shape for batch in batches] == [(8, 2, 2, 3)] * 3
    assert Counter(ids(batches)) == {0: 8, 1: 8, 2: 8}


def test_a_seed_decides_everything():
    def batches(seed):
        with numbers_loader(Numbers(500), batch_size=32, dropout=0.3, seed=seed) as loader:
            return take(loader, 20)

    assert_same(batches(3), batches(3))
    assert ids(batches(3)) != ids(batches(4))
    assert sorted(ids(batches(2**70))[:500]) == list(range(500))


def test_captions_are_dropped_by_share_example_and_epoch():
    with numbers_loader(Numbers(1000), batch_size=100, dropout=0.2) as loader:
        batches = take(loader, 100)
    tokens = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    numbers = np.array(ids(batches))
    assert set(np.unique(tokens - numbers)) <= {1, *(-numbers)}
    dropped = tokens == 0
    assert dropped.mean() == pytest.approx(0.2, abs=5 * (0.16 / 10_000) ** 0.5)
    times = np.bincount(numbers, weights=dropped, minlength=1000)
    # Binomial(10, 0.2): of 1000 examples 107 never, and hardly any more than 7 times.
    assert 60 < (times == 0).sum() < 160
    assert times.max() <= 8
    # Neighbours are dropped independently.
    assert (dropped[1:] & dropped[:-1]).mean() == pytest.approx(0.04, abs=0.012)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_no_caption_or_every_caption_is_dropped(dropout):
    with numbers_loader(Numbers(50), batch_size=50, dropout=dropout) as loader:
        tokens = next(loader)["tokens"]
    assert (tokens == 0).all() == (dropout == 1.0)
    assert (tokens == 0).any() == (dropout == 1.0)


@pytest.mark.parametrize("stop", [0, 1, 2, 7, 25, 40])
@pytest.mark.parametrize("bad", [(), (0, 1, 2, 3, 4, 5, 6, 30, 36)])
@pytest.mark.parametrize("rows", [None, (3, 4, 5)])
def test_a_resumed_loader_gives_the_same_batches(stop, bad, rows):
    """37 examples, batches of 6, all or half of them: 40 batches cross several epochs."""

    def loader():
        return numbers_loader(Numbers(37, bad), batch_size=6, dropout=0.3, rows=rows)

    with loader() as never_stopped:
        expected = take(never_stopped, 50)
    with loader() as first:
        assert_same(take(first, stop), expected[:stop])
        state = json.loads(json.dumps(first.get_state()))
    with loader() as resumed:
        take(resumed, 3)  # wherever it is
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert_same(take(resumed, 10), expected[stop : stop + 10])
        resumed.set_state(state)
        assert_same(take(resumed, 10), expected[stop : stop + 10])


def test_the_state_does_not_depend_on_what_was_read_ahead():
    states = []
    for pause in (0.0, 0.1):
        with numbers_loader(Numbers(100)) as loader:
            take(loader, 5)
            time.sleep(pause)
            states.append(loader.get_state())
    assert states[0] == states[1]
    assert states[0]["position"] == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 41}, "the checkpoint's data had size=40, now it is 41"),
        ({"seed": 1}, "the checkpoint's data had seed=0, now it is 1"),
        ({"batch_size": 3}, "stopped after 8 samples, which are no whole batches of 3"),
    ],
)
def test_the_state_of_other_data_is_refused(change, message):
    with numbers_loader(Numbers(40)) as loader:
        take(loader, 2)
        state = loader.get_state()
    arguments = dict(change)
    source = Numbers(arguments.pop("size", 40))
    with (
        numbers_loader(source, **arguments) as other,
        pytest.raises(UserError, match=message) as raised,
    ):
        other.set_state(state)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [64, 101])
@pytest.mark.parametrize("bad", [(), range(0, 50, 7)])
@pytest.mark.parametrize("parts", [[(0, 1), (2, 3), (4, 5)], [(0, 2, 4), (1, 3, 5)]])
def test_processes_share_each_batch(size, bad, parts):
    """Put together, their rows are the batches that one process alone would read."""
    batches = size // 2
    with numbers_loader(Numbers(size, bad), batch_size=6, dropout=0.3) as alone:
        expected = take(alone, batches)
        state = alone.get_state()
    for rows in parts:
        with numbers_loader(Numbers(size, bad), batch_size=6, dropout=0.3, rows=rows) as loader:
            for batch, whole in zip(take(loader, batches), expected, strict=True):
                assert batch["id"] == [whole["id"][row] for row in rows]
                np.testing.assert_array_equal(batch["image"], whole["image"][list(rows)])
                np.testing.assert_array_equal(batch["tokens"], whole["tokens"][list(rows)])
            assert loader.get_state() == state


def test_other_numbers_of_processes_go_on_with_no_sample_twice_or_missed():
    size, seen, state = 96, [], None
    for parts in ([range(8)], [range(4), range(4, 8)], [range(i, i + 1) for i in range(8)]):
        together = []
        for rows in parts:
            with numbers_loader(Numbers(size), batch_size=8, rows=rows) as loader:
                if state is not None:
                    loader.set_state(state)
                together.append(take(loader, 4))
                after = loader.get_state()
        state = after
        for batch in zip(*together, strict=True):
            seen += ids(batch)
    assert sorted(seen) == list(range(size))


def test_bad_examples_are_replaced_and_batches_stay_full():
    source = Numbers(50, bad=range(0, 50, 10))
    with numbers_loader(source, batch_size=10) as loader:
        batches = take(loader, 40)
    with numbers_loader(Numbers(50), batch_size=10) as loader:
        whole = take(loader, 40)
    assert {len(batch["id"]) for batch in batches} == {10}
    for one, other in zip(ids(batches), ids(whole), strict=True):
        assert one not in source.broken
        assert one == other or other in source.broken  # nothing else has moved
    for epoch in range(8):  # none is missed, and what stands in for five is not one alone
        times = Counter(ids(batches)[50 * epoch : 50 * (epoch + 1)])
        assert sorted(times) == sorted(set(range(50)) - source.broken)
        assert max(times.values()) <= 4
    assert source.bad.count == 5


def test_a_long_run_of_bad_examples_is_passed():
    """The one example that can be read stands in for all."""
    source = Numbers(2000, bad=range(1, 2000), max_bad_share=1.0)
    with numbers_loader(source, batch_size=2) as loader:
        assert ids(take(loader, 2)) == [0] * 4


def test_too_many_bad_examples_stop_training():
    with (
        numbers_loader(Numbers(100, bad=range(20), max_bad_share=0.1)) as loader,
        pytest.raises(UserError, match=r"pictures cannot be used.*data\.max_bad_share=0\.1"),
    ):
        take(loader, 1000)


def test_when_all_are_bad_it_does_not_search_for_ever():
    with (
        numbers_loader(Numbers(30, bad=range(30), max_bad_share=1.0)) as loader,
        pytest.raises(UserError, match="30 of 30 pictures cannot be used"),
    ):
        next(loader)


def test_an_empty_source_is_refused():
    with pytest.raises(UserError, match="source=tfds:shapes has no examples"):
        numbers_loader(Numbers(0))


def test_an_error_in_a_thread_reaches_the_caller():
    data = DataConfig(batch_size=4)
    with (
        make_loader(Numbers(10), data=data, tokenize=lambda captions: 1 / 0) as loader,
        pytest.raises(ZeroDivisionError),
    ):
        next(loader)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    with numbers_loader(Numbers(10)) as loader:
        next(loader)
        started = set(threading.enumerate()) - before
        assert started
    for thread in started:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_a_folder_with_bad_pictures_resumes_too(tmp_path):
    for i in range(30):
        Image.new("RGB", (9 + i, 20), (i, i, i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(str(i))
    for i in (3, 4, 20):
        (tmp_path / f"{i}.png").write_bytes(b"torn")
    data = DataConfig(f"folder:{tmp_path}", batch_size=5, resolution=8, max_bad_share=0.1)

    def loader():
        return make_loader(open_source(data), data=data, tokenize=tokenize_length)

    with loader() as never_stopped:
        expected = take(never_stopped, 30)
    with loader() as first:
        take(first, 7)
        state = first.get_state()
    with loader() as resumed:
        resumed.set_state(state)
        assert_same(take(resumed, 23), expected[7:])
    assert not {"3.png", "4.png", "20.png"} & {name for b in expected for name in b["id"]}


def test_dreambooth_batches(tmp_path):
    with zipfile.ZipFile(shared_path("assets/dreambooth_512.zip")) as archive:
        archive.extractall(tmp_path)
    data = DataConfig(f"folder:{tmp_path}", batch_size=8, resolution=64)
    source = open_source(data)

    def tokenize_bytes(captions):
        return np.array([list(c.encode()[:20].ljust(20, b"\0")) for c in captions], np.int32)

    with make_loader(source, data=data, tokenize=tokenize_bytes) as loader:
        batches = take(loader, 4)
    for batch in batches:
        assert batch["image"].shape == (8, 64, 64, 3)
        assert batch["tokens"].shape == (8, 20)
    assert len({name for batch in batches for name in batch["id"]}) == 32


def test_shapes_come_fast_enough_for_training():
    """In the processor's time, which other work on the machine hardly changes."""
    data = DataConfig("generated:shapes/100000", batch_size=64)
    with make_loader(open_source(data), data=data, tokenize=tokenize_words) as loader:
        take(loader, 10)
        before = time.process_time()
        take(loader, 100)
        taken = time.process_time() - before
    assert 6400 / taken > 2000
