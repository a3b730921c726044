"""The FLUX.2 pipeline: what it shares with FLUX.1's is tested there."""

import json
from dataclasses import replace

import numpy as np
import pytest

import taca_jax as tj
from taca_jax.errors import UserError
from taca_jax.families.flux2.diffusers import SCHEDULE
from taca_jax.families.flux2.family import FLUX2 as FAMILY
from taca_jax.families.flux2.model import FLUX2_DEV, KLEIN_4B, KLEIN_BASE_4B, Flux2Config
from taca_jax.weights.pipeline_folders import PipelineSettings
from tests.families.flux2.tiny import FLUX2
from tests.processes import last_line, run_python
from tests.random_models import random_model


@pytest.fixture(scope="module")
def pipeline():
    settings = PipelineSettings(
        tokenizer=None, text_length=5, resolution=64, steps=2, guidance=3.0, schedule=SCHEDULE
    )
    return tj.Flux2Pipeline(
        random_model(FLUX2), text_encoder=None, tokenizer=None, autoencoder=None, settings=settings
    )


def embeds(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 5, FLUX2.txt_dim)).astype(np.float32)


def test_embeddings_of_tokens_are_enough(pipeline):
    """And a position of the latents is 16 pixels, though no autoencoder says so."""
    call = {
        "prompt_embeds": embeds(2),
        "negative_prompt_embeds": embeds(1, 1),
        "height": 64,
        "width": 32,
        "output": "latents",
    }
    drawn = pipeline(**call).latents
    assert drawn.shape == (2, 4, 2, 128)
    unguided = pipeline(**call | {"guidance": 1.0, "negative_prompt_embeds": None}).latents
    assert np.abs(drawn - unguided).max() > 1e-3
    warm = pipeline(**call, taca=tj.TacaConfig(gamma=1.5, first_steps=1)).latents
    assert np.abs(drawn - warm).max() > 1e-3
    with pytest.raises(UserError, match="64 x 40 pixels: both must be multiples of 16"):
        pipeline(**call | {"width": 40})
    with pytest.raises(UserError, match=r"pooled \(2, 3\); expected"):
        pipeline(**call, pooled_prompt_embeds=np.zeros((2, 3), np.float32))


def test_without_encoders_it_says_which(pipeline):
    with pytest.raises(UserError, match=r"FLUX\.2 \[klein\] has Qwen3"):
        pipeline("a fox", output="latents")


def test_defaults_of_released_models():
    calls = [FAMILY.defaults_of(each) for each in (KLEIN_BASE_4B, KLEIN_4B, FLUX2_DEV)]
    assert [(call.steps, call.guidance) for call in calls] == [(50, 4.0), (4, 1.0), (50, 4.0)]
    assert FAMILY.embeds_guidance(FLUX2_DEV)
    assert not FAMILY.embeds_guidance(KLEIN_BASE_4B)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"axes_dim": (2, 2, 2, 4)}, "must be even and sum to head_dim 8"),
        ({"num_single_blocks": 0}, "at least one double and one single block"),
        ({"pooled_dim": 3}, "no pooled text"),
    ],
)
def test_configs_that_are_none(change, words):
    with pytest.raises(UserError, match=words):
        replace(FLUX2, **change)


def test_guidance_is_an_input_of_dev_alone():
    transformer = random_model(replace(FLUX2, guidance_embed=True))
    assert isinstance(transformer.config, Flux2Config)
    latents, time, txt = np.zeros((1, 2, 2, 128)), np.ones(1), embeds(1)
    with pytest.raises(ValueError, match="takes a guidance scale"):
        transformer(latents, time, txt)
    with pytest.raises(ValueError, match="no guidance embedding"):
        random_model(FLUX2)(latents, time, txt, guidance=np.ones(1))


def test_meshes_draw_as_one_device_does(tmp_path):
    """Over `tensor` too, where the parts of a single block's projection are not a device's own."""
    script = ("-m", "tests.families.flux2.drawn_on_mesh", str(tmp_path / "p"))
    found = json.loads(last_line(run_python(*script, devices=8)))
    assert found.keys() == {"fsdp", "mixed"}
    assert max(found.values()) < 2e-5
