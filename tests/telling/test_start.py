"""The lines of a start: what they say, and how wide they are."""

import jax
import numpy as np
from jax.sharding import Mesh

from taca_jax.telling.start import devices_and_mesh, fact, listed, number, size


def test_a_fact_is_wrapped_at_80_columns_and_paths_are_whole():
    path = "/a/folder/" + "with-a-long-name/" * 6
    lines = fact("draws", f"{'some words ' * 12}into {path}").splitlines()
    assert all(len(line) <= 80 for line in lines if path not in line)
    assert any(path in line for line in lines)
    assert lines[0].startswith("draws: some words")
    assert all(line.startswith("  ") for line in lines[1:])


def test_devices_are_named_with_their_mesh():
    assert devices_and_mesh(None).startswith("CPU")
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "context"))
    assert "mesh of" not in devices_and_mesh(mesh)


def test_numbers_in_words():
    assert [number(n) for n in (17, 1500, 2_650_000, 11_901_408_320)] == [
        "17",
        "1.5 k",
        "2.65 M",
        "11.9 B",
    ]
    assert size(23_800_000_000) == "23.8 GB"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
