"""Where pictures are drawn: which mesh, and whether all models are in memory at once."""

import jax
import pytest

from taca_jax.parallel import choice
from taca_jax.parallel.choice import DRAWING_SHARE, Place, choose_place, drawing_meshes
from taca_jax.parallel.mesh import MeshConfig

OPEN = MeshConfig()


@pytest.mark.parametrize(
    ("config", "devices", "samples", "heads", "expected"),
    [
        (OPEN, 1, 1, 24, [MeshConfig(fsdp=1)]),
        # One picture: all of them share it.
        (
            OPEN,
            *(8, 1, 24),
            [MeshConfig(fsdp=1, context=8), MeshConfig(fsdp=1, tensor=8), MeshConfig(fsdp=1)],
        ),
        # The two halves of classifier-free guidance; 38 heads halve only once.
        (
            OPEN,
            *(8, 2, 38),
            [
                MeshConfig(data=2, fsdp=1, context=4),
                MeshConfig(fsdp=2, tensor=2, context=2),
                MeshConfig(fsdp=4, tensor=2),
            ],
        ),
        # As many pictures as devices, or twice as many.
        (OPEN, 8, 8, 24, [MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=8)]),
        (OPEN, 8, 16, 24, [MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=8)]),
        (
            MeshConfig(tensor=2),
            *(8, 2, 24),
            [
                MeshConfig(data=2, fsdp=1, tensor=2, context=2),
                MeshConfig(fsdp=2, tensor=4),
            ],
        ),
        # What is asked for is left alone.
        (MeshConfig(fsdp=-1), 8, 1, 24, [MeshConfig(fsdp=-1)]),
        (MeshConfig(data=2, fsdp=4), 8, 1, 24, [MeshConfig(data=2, fsdp=4)]),
        (MeshConfig(context=-1), 8, 1, 24, [MeshConfig(context=-1)]),
        (MeshConfig(tensor=3), 8, 1, 24, [MeshConfig(tensor=3)]),
    ],
)
def test_devices_take_samples_first_and_share_the_rest(config, devices, samples, heads, expected):
    found = drawing_meshes(config, devices, samples, heads)
    assert list(found) == expected[: len(found)]
    if devices % (config.context * config.tensor) == 0:
        assert all(mesh.sizes(devices) for mesh in found)


MESHES = ("whole", "shared")
SIZES = {
    "whole": {"text": 40, "transformer": 60, "autoencoder": 1},
    "shared": {"text": 10, "transformer": 15, "autoencoder": 1},
}


@pytest.fixture
def memory(monkeypatch):
    def of(size):
        known = None if size is None else size / DRAWING_SHARE
        monkeypatch.setattr(choice, "memory_of", lambda _: known)

    monkeypatch.setattr(choice, "_first_device", lambda mesh: mesh)
    return of


@pytest.mark.parametrize(
    ("size", "stages", "expected"),
    [
        (101, None, Place("whole", False)),
        (100, None, Place("shared", False)),
        (25, None, Place("shared", True)),
        (60, True, Place("whole", True)),
        (59, True, Place("shared", True)),
        (25, False, Place("shared", False)),  # the compiler has the last word
        (1, None, Place("shared", True)),
        (None, None, Place("shared", False)),
        (None, True, Place("shared", True)),
    ],
)
def test_all_models_are_in_memory_where_they_fit(memory, size, stages, expected):
    memory(size)
    assert choose_place(MESHES, SIZES.__getitem__, stages=stages) == expected


def test_the_first_device_alone_needs_no_mesh():
    place = choose_place([None], lambda _: {"transformer": 1})
    assert place == Place(None, False)
    assert choice.memory_of(jax.devices("cpu")[0]) is None
