"""Buckets, weights and alternative captions: what each place of the stream holds."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from taca_jax.data.buckets import bucket_sizes, make_buckets
from taca_jax.data.config import DataConfig
from taca_jax.data.loader import make_loader
from taca_jax.data.order import Bucket, Stream, turn
from taca_jax.data.sources.factory import open_source
from taca_jax.data.sources.mixing import MixedSource
from taca_jax.errors import UserError
from tests.data.making import picture_bytes, write_tar

SHAPES = [(40, 40)] * 9 + [(80, 40)] * 7 + [(40, 80)] * 12 + [(30, 29)] * 5 + [(500, 20)]
"""Width and height of the pictures of a tar."""


@pytest.fixture
def tar(tmp_path):
    files = {}
    for i, size in enumerate(SHAPES):
        files |= {f"{i:02}.png": picture_bytes(i, size=size), f"{i:02}.txt": str(i)}
    return write_tar(tmp_path / "t.tar", files)


def data_of(path, **changes):
    usual = {"resolution": 32, "aspect": "buckets", "batch_size": 3, "caption_dropout": 0.0}
    return DataConfig(f"webdataset:{path}", **(usual | changes))


def tokenize(texts):
    return np.array([[int(text or -1)] for text in texts])


def loader_of(data, **options):
    source = open_source(data)
    least = data.batch_size * options.get("together", 1)
    buckets = make_buckets(source, data, multiple=8, least=least)
    return make_loader(source, data=data, tokenize=tokenize, buckets=buckets, **options)


# Sizes


@pytest.mark.parametrize(
    ("resolution", "multiple", "most"), [(1024, 16, 2.0), (512, 16, 3.0), (40, 4, 2.0), (64, 16, 2)]
)
def test_buckets_have_the_area_of_the_square(resolution, multiple, most):
    sizes = bucket_sizes(resolution, multiple, most)
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0.75 * resolution**2 <= height * width <= resolution**2
        assert max(height, width) <= most * min(height, width)
    assert {(width, height) for height, width in sizes} == set(sizes)
    assert sizes == sorted(sizes)
    aspects = [height / width for height, width in sizes]
    assert aspects == sorted(aspects)
    assert bucket_sizes(resolution, multiple, 1.0) == [(resolution, resolution)]


def test_buckets_at_1024_pixels():
    sizes = bucket_sizes(1024, 16, 2.0)
    assert len(sizes) == 9
    assert all(side % 64 == 0 for size in sizes for side in size)
    assert (832, 1216) in sizes


def test_each_picture_falls_into_the_nearest(tar):
    data = data_of(tar)
    buckets = make_buckets(open_source(data), data, multiple=8, least=3)
    assert {bucket.size: bucket.parts[0].tolist() for bucket in buckets} == {
        (24, 40): [*range(9, 16), 33],
        (32, 32): [*range(9), *range(28, 33)],
        (40, 24): [*range(16, 28)],
    }


def test_small_buckets_are_given_up_for_their_neighbours(tar):
    data = data_of(tar)
    wide, square = make_buckets(open_source(data), data, multiple=8, least=9)
    assert (wide.size, square.size) == ((32, 32), (40, 24))
    assert (len(wide), len(square)) == (len(SHAPES) - 12, 12)


def test_small_pictures_are_left_out(tar, caplog):
    data = data_of(tar, min_side=30, aspect="square")
    (bucket,) = make_buckets(open_source(data), data, multiple=8, least=3)
    assert bucket.size is None
    assert bucket.parts[0].tolist() == list(range(28))
    assert "left out 6 of 34 pictures, with a side of fewer than data.min_side=30" in caplog.text
    with pytest.raises(UserError, match=r"none of 34 pictures has sides of data\.min_side=99"):
        make_buckets(open_source(data), data_of(tar, min_side=99), multiple=8, least=3)


@pytest.mark.parametrize("change", [{"aspect": "buckets"}, {"min_side": 20}])
def test_pictures_of_one_size_have_no_buckets(change):
    data = DataConfig("generated:shapes/20", **change)
    with pytest.raises(UserError, match="those of generated:shapes/20 have one: leave it out"):
        make_buckets(open_source(data), data, multiple=4, least=1)


# Order


@pytest.mark.parametrize("shares", [[1], [3, 1], [5, 2, 2, 1], [1, 100], [7, 0, 7]])
def test_turns_are_exact_and_even(shares):
    total = sum(shares)
    turns = [turn(place, shares) for place in range(3 * total)]
    seen = Counter()
    for place, (who, before) in enumerate(turns):
        assert seen[who] == before
        seen[who] += 1
        for i, share in enumerate(shares):
            assert abs(seen[i] - (place + 1) * share / total) <= len(shares) - 1
    assert [seen[i] for i in range(len(shares))] == [3 * share for share in shares]
    far = 10**15
    assert turn(far * total, shares)[1] == far * shares[turn(far * total, shares)[0]]


def test_batches_are_of_one_bucket_and_epochs_hold_each_example_once():
    parts = [np.arange(0, 10), np.arange(10, 17), np.arange(17, 40)]
    buckets = [Bucket((8, 8 * i), (part,)) for i, part in enumerate(parts)]
    stream = Stream(buckets, batch_size=4, together=2, seed=0)
    epochs, order = {0: [], 1: [], 2: []}, []
    for batch in range(40):
        bucket = stream.bucket(batch)
        assert bucket == stream.bucket(batch // 2 * 2)
        order.append(bucket)
        found = [next(stream.at(batch, row)) for row in range(4)]
        assert set(found) <= set(parts[bucket].tolist())
        epochs[bucket] += found
    assert [order.count(i) for i in range(3)] == [10, 6, 24]  # of 10, 7 and 23
    for bucket, part in enumerate(parts):
        size, seen = len(part), epochs[bucket]
        for start in range(0, len(seen) - size + 1, size):
            assert sorted(seen[start : start + size]) == part.tolist()


def test_an_aspect_that_squares_do_not_have_is_refused():
    with pytest.raises(UserError) as refusal:
        DataConfig("folder:a", max_aspect=1.5)
    assert str(refusal.value) == (
        "data.max_aspect is 1.5, which data.aspect=square does not read; set data.aspect=buckets"
    )


def test_weights_say_how_often_a_source_is_drawn_from():
    parts = (np.arange(100), np.arange(100, 110))
    for weights, share in (((0.7, 0.3), 0.7), ((), 100 / 110), ((2, 2), 0.5)):
        stream = Stream([Bucket(None, parts)], weights=weights, batch_size=10, seed=0)
        found = [next(stream.at(batch, row)) for batch in range(110) for row in range(10)]
        first = [index for index in found if index < 100]
        assert len(first) == pytest.approx(1100 * share, abs=1)
        counts = Counter(index for index in found if index >= 100)
        assert max(counts.values()) - min(counts.values()) <= 1
    tiny = Stream([Bucket(None, parts)], weights=(3e-8, 1e-8), batch_size=10, seed=0)
    found = [next(tiny.at(batch, row)) for batch in range(100) for row in range(10)]
    assert sum(index < 100 for index in found) == 750
    rare = Stream([Bucket(None, parts)], weights=(1, 1e-7), batch_size=10**7, seed=0)
    ((much, little),) = rare._mixes
    assert much == 10**7 * little > 0
    # Over buckets too: a source's share is of all its pictures.
    split = [Bucket((8, 8), (np.arange(20), np.arange(100, 109)))]
    split.append(Bucket((8, 16), (np.arange(20, 100), np.arange(109, 110))))
    stream = Stream(split, weights=(0.5, 0.5), batch_size=10, seed=0)
    found = [next(stream.at(batch, row)) for batch in range(200) for row in range(10)]
    assert sum(index < 100 for index in found) == pytest.approx(1000, abs=20)
    times = Counter(found)
    assert times[109] == pytest.approx(times[100], abs=2)


# Through the loader


def take(loader, count):
    return list(islice(loader, count))


def test_batches_of_buckets_have_one_size_and_resume_exactly(tar):
    data = data_of(tar, seed=3)
    with loader_of(data, together=2) as loader:
        batches = take(loader, 40)
    shapes = [batch["image"].shape for batch in batches]
    assert set(shapes) == {(3, 24, 40, 3), (3, 32, 32, 3), (3, 40, 24, 3)}
    assert shapes[::2] == shapes[1::2]
    for batch in batches:
        grey = batch["image"].mean((1, 2, 3))
        np.testing.assert_allclose(grey, batch["tokens"][:, 0], atol=1)
    for stop in (1, 2, 17):
        with loader_of(data, together=2) as first:
            take(first, stop)
            state = first.get_state()
        with loader_of(data, together=2) as resumed:
            resumed.set_state(state)
            for batch, expected in zip(take(resumed, 8), batches[stop:], strict=False):
                assert batch["id"] == expected["id"]
                np.testing.assert_array_equal(batch["image"], expected["image"])
    for rows in ([0, 2], [1]):  # of two processes
        with loader_of(data, together=2, rows=rows) as part:
            for batch, whole in zip(take(part, 9), batches, strict=False):
                assert batch["id"] == [whole["id"][row] for row in rows]
                assert batch["image"].shape[1:] == whole["image"].shape[1:]


def test_several_sources_are_mixed_by_weight(tmp_path):
    for name, numbers in (("a", range(8)), ("b", range(8, 10))):
        files = {}
        for i in numbers:
            files |= {f"{i}.png": picture_bytes(i), f"{i}.txt": str(i)}
        write_tar(tmp_path / f"{name}.tar", files)
    names = tuple(f"webdataset:{tmp_path}/{name}.tar" for name in "ab")
    data = DataConfig(names, batch_size=4, resolution=16, weights=(1, 1), caption_dropout=0)
    source = open_source(data)
    assert isinstance(source, MixedSource)
    with make_loader(source, data=data, tokenize=tokenize) as loader:
        for batch in take(loader, 8):
            assert sum(int(number) >= 8 for number in batch["tokens"][:, 0]) == 2


def test_one_of_several_captions_is_drawn_by_place(tmp_path):
    files = {}
    for i in range(6):
        files |= {
            f"{i}.png": picture_bytes(i),
            f"{i}.json": {"captions": [f"{i}{j}" for j in "123"]},
        }
    data = DataConfig(
        f"webdataset:{write_tar(tmp_path / 't.tar', files)}",
        batch_size=6,
        resolution=16,
        caption_dropout=0.25,
    )

    def epochs():
        with make_loader(open_source(data), data=data, tokenize=tokenize) as loader:
            return take(loader, 60)

    found = epochs()
    read = Counter(int(token) for batch in found for token in batch["tokens"][:, 0])
    assert read.pop(-1) == pytest.approx(90, abs=40)
    assert set(read) == {10 * i + j for i in range(6) for j in (1, 2, 3)}
    assert max(read.values()) <= 30
    for batch in found:
        pairs = zip(batch["id"], batch["tokens"][:, 0], strict=True)
        assert all(
            token in (-1, *(10 * int(name[-1]) + j for j in (1, 2, 3))) for name, token in pairs
        )
    assert [b["tokens"].tolist() for b in epochs()] == [b["tokens"].tolist() for b in found]
