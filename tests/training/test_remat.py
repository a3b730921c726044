"""What the backward pass keeps and recomputes: counted, and chosen by the memory of the devices."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from configs import flux2_taca, flux_taca
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.chips import CHIPS
from taca_jax.training import remat as module
from taca_jax.training.models import open_models
from taca_jax.training.remat import CANDIDATES, choose_remat, first_that_fits, kept_bytes

CONFIG = replace(flux_taca.CONFIG, data=replace(flux_taca.CONFIG.data, encode="cache"))
TOKENS, HIDDEN, HEADS, DOUBLE, SINGLE = 512 + 4096, 3072, 24, 19, 38
BF16, F32 = 2, 4


def test_of_flux_each_step_keeps_what_it_says():
    """Per image at 1024 px, beyond what the step after it keeps; the last, each block's input."""
    models = open_models(CONFIG, published=True)
    kept = {remat: kept_bytes(models, remat) for remat in (*CANDIDATES, "full")}
    blocks, array = DOUBLE + SINGLE, TOKENS * HIDDEN * BF16
    sums = 2 * TOKENS * HEADS * F32
    lora = 4 * TOKENS * CONFIG.lora.rank * BF16  # x A of q, k, v and out
    assert kept["attention"] - kept["full"] == blocks * (array + sums + lora)
    assert kept["attention+qkv"] - kept["attention"] == 3 * blocks * array
    # In double blocks the attention's projection too, which the MLP reads.
    products = 4 * blocks * array + DOUBLE * array
    assert kept["attention+qkv+mlp"] - kept["attention+qkv"] == products
    assert kept["full"] == pytest.approx(blocks * array, rel=0.1)


def test_of_flux2_too():
    """Whose single blocks have one product for queries, keys, values and MLP, kept in parts."""
    config = replace(flux2_taca.CONFIG, data=replace(flux2_taca.CONFIG.data, encode="cache"))
    models = open_models(config, published=True)
    assert config.remat == "auto"
    kept = {remat: kept_bytes(models, remat) for remat in (*CANDIDATES, "full")}
    double, single, array = 5, 20, TOKENS * HIDDEN * BF16
    blocks, sums = double + single, 2 * TOKENS * HEADS * F32
    lora = (4 * double + 2 * single) * TOKENS * config.lora.rank * BF16
    assert kept["attention"] - kept["full"] == blocks * (array + sums) + lora
    assert kept["attention+qkv"] - kept["attention"] == 3 * blocks * array
    products = 6 * blocks * array + double * array
    assert kept["attention+qkv+mlp"] - kept["attention+qkv"] == products


KEPT: dict[Remat, float] = {
    "attention+qkv+mlp": 15.2e9,
    "attention+qkv": 8.2e9,
    "attention": 3.4e9,
    "full": 1.7e9,
}
"""Of FLUX.1-dev, as in the test above."""


@pytest.mark.parametrize(
    ("chip", "parameters", "remat"),
    [
        ("v5e", 1.5e9, "full"),
        ("v6e", 1.5e9, "attention"),
        ("v5p", 48e9, "attention+qkv"),
        ("v5p", 24e9, "attention+qkv+mlp"),
    ],
)
def test_with_four_images_a_chip(chip, parameters, remat):
    room = module.FREE_SHARE * CHIPS[chip].memory - parameters
    assert first_that_fits(KEPT.__getitem__, samples=4, blocks=57, room=room) == remat


def test_with_one_image_a_chip_nothing_is_recomputed():
    room = module.FREE_SHARE * CHIPS["v6e"].memory - 1.5e9
    taken = first_that_fits(KEPT.__getitem__, samples=1, blocks=57, room=room)
    assert taken == "attention+qkv+mlp"


def test_what_is_configured_is_taken():
    for remat in ("none", "attention", "full"):
        models = open_models(replace(CONFIG, remat=remat), published=True)
        assert choose_remat(models, None) == models.on_mesh(None).remat == remat


def test_where_the_memory_is_not_known_all_is_recomputed():
    models = open_models(CONFIG, published=True).on_mesh(None)
    assert models.remat == "full"
    assert models.abstract_transformer().remat == "full"


def test_on_a_mesh_it_is_settled_for_a_device(monkeypatch):
    """Sixteen v6e chips that share parameters and 64 samples."""
    device = SimpleNamespace(device_kind="TPU v6e")
    mesh = SimpleNamespace(
        devices=np.array([device]), shape={"data": 1, "fsdp": 16, "context": 1, "tensor": 1}
    )
    config = replace(CONFIG, data=replace(CONFIG.data, batch_size=64))
    models = open_models(config, published=True)
    monkeypatch.setattr(module, "kept_bytes", lambda _, remat: KEPT[remat])
    monkeypatch.setattr(type(models), "step_bytes", lambda _: 1.5e9)
    assert choose_remat(models, mesh) == "attention"
