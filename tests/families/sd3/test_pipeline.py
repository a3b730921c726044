"""The Stable Diffusion 3 pipeline: what it shares with FLUX's is tested there."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.families.sd3.diffusers import SCHEDULE
from taca_jax.families.sd3.family import SD3
from taca_jax.families.sd3.pipeline import SD3Pipeline
from taca_jax.families.sd3.text import SD3Text
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.sampling.loop import SkipLayers
from taca_jax.taca import TacaConfig
from taca_jax.text.tokenizers import ByteTokenizer, JoinedTokenizer
from taca_jax.weights.pipeline_folders import PipelineSettings
from tests import models as tiny
from tests.random_models import random_model

TINY = replace(tiny.SD3, num_layers=3, num_dual_layers=1)
CLIP = replace(
    tiny.CLIP,
    vocab_size=ByteTokenizer(1).vocab_size,
    max_tokens=4,
    dim=TINY.txt_dim // 2,
    projection_dim=TINY.pooled_dim // 2,
)


@pytest.fixture(scope="module")
def pipeline():
    settings = PipelineSettings(
        tokenizer=None, text_length=5, resolution=64, steps=4, guidance=3.0, schedule=SCHEDULE
    )
    return SD3Pipeline(
        random_model(TINY), text_encoder=None, tokenizer=None, autoencoder=None, settings=settings
    )


def text(seed=0, batch=1, sign=""):
    keys = jax.random.split(jax.random.key(seed))
    return {
        f"{sign}prompt_embeds": jax.random.normal(keys[0], (batch, 5, TINY.txt_dim)),
        f"{sign}pooled_prompt_embeds": jax.random.normal(keys[1], (batch, TINY.pooled_dim)),
    }


BOTH = text() | text(1, sign="negative_")


def latents(pipeline, **options):
    return pipeline(**(BOTH | {"output": "latents"} | options)).latents


@pytest.fixture(scope="module")
def drawn(pipeline):
    return latents(pipeline)


def test_latents_are_an_eighth_of_the_picture(drawn):
    assert drawn.shape == (1, 8, 8, 4)
    assert np.isfinite(drawn).all()


def test_the_schedule_is_shifted_twice_at_its_end():
    """As diffusers' scheduler at shift 3, from its own timesteps."""
    sigmas = SCHEDULE.sigmas(5, 4096)
    np.testing.assert_allclose(sigmas, [1, 0.90044, 0.75112, 0.50298, 0.00893, 0], atol=1e-4)


def test_guidance_needs_something_to_go_away_from(pipeline, drawn):
    away = latents(pipeline, **text(2, sign="negative_"))
    assert np.abs(away - drawn).max() > 1e-3
    with pytest.raises(UserError, match=r"lacks a text encoder \(Stable Diffusion 3 has two CLIPs"):
        pipeline(**text(), output="latents")
    one = latents(pipeline, guidance=1.0, **dict.fromkeys(text(sign="negative_")))
    assert np.abs(one - drawn).max() > 1e-3
    with pytest.raises(UserError, match="a negative prompt acts with guidance above 1; it is 1"):
        latents(pipeline, guidance=1.0)


def test_several_pictures_of_several_prompts(pipeline):
    """Each prompt's pictures one after another, from the noise of seeds that go on."""
    reader = SD3Pipeline(
        pipeline.transformer,
        text_encoder=SD3Text(
            random_model(CLIP), random_model(CLIP, seed=1), None, width=TINY.txt_dim, t5_length=1
        ),
        tokenizer=JoinedTokenizer((ByteTokenizer(4), ByteTokenizer(4))),
        autoencoder=None,
        settings=pipeline.settings,
    )
    prompts = ["ab", "c"]
    several = reader(prompts, "d", num_images=2, seed=5, output="latents").latents
    assert several.shape == (4, 8, 8, 4)
    both = reader(prompts, ["d", "d"], num_images=2, seed=5, output="latents").latents
    np.testing.assert_allclose(both, several, atol=1e-4)
    # And given as embeddings and as noise.
    given = {}
    for sign, which in (("", prompts), ("negative_", ["d"])):
        read = reader.encode_prompts(which)
        given |= {f"{sign}prompt_embeds": read.txt, f"{sign}pooled_prompt_embeds": read.pooled}
    noise = np.stack([jax.random.normal(jax.random.key(seed), (8, 8, 4)) for seed in range(5, 9)])
    out = pipeline(**given, num_images=2, latents=noise, seed=0, output="latents").latents
    np.testing.assert_allclose(out, several, atol=1e-4)
    for i, prompt in ((0, prompts[0]), (3, prompts[1])):
        one = reader([prompt] * 2, "d", num_images=2, latents=noise, output="latents").latents
        np.testing.assert_allclose(one[i], several[i], atol=1e-4)
    assert np.abs(several[1] - several[0]).max() > 0.1
    three = text(batch=3, sign="negative_")
    with pytest.raises(UserError, match="3 negative prompts for 4 pictures; give one"):
        pipeline(**text(batch=2), **three, num_images=2, output="latents")
    with pytest.raises(UserError, match=r"latents are \(4, 8, 8, 4\); expected 2 of 4 channels"):
        reader(prompts, latents=noise, output="latents")


def test_taca_on_one_half_or_both(pipeline, drawn):
    taca = {"gamma": 2.0, "threshold": 500}
    both, half = (
        latents(pipeline, taca=TacaConfig(**taca, cond_only=cond_only))
        for cond_only in (False, True)
    )
    for one, other in ((drawn, both), (drawn, half), (both, half)):
        assert np.abs(one - other).max() > 1e-3


def test_layers_are_skipped_at_their_steps_only(pipeline, drawn, caplog):
    seen = []
    for skip in ([0], SkipLayers((0,), stop=0.6), SkipLayers((1, 2), stop=0.6)):
        run = pipeline(**BOTH, output="latents", skip_layers=skip, trajectory=True)
        seen.append(run.trajectory.latents)
    (said,) = caplog.messages
    assert said.endswith("0.01 n < i < 0.2 n, which is none of 4: it does nothing here")
    np.testing.assert_allclose(seen[0][-1], drawn, atol=1e-5)  # 4 steps are too few for 0.2 of them
    np.testing.assert_allclose(seen[1][0], seen[0][0], atol=1e-5)  # the first step never
    assert np.abs(seen[1][1] - seen[0][1]).max() > 1e-3
    assert np.abs(seen[1][1] - seen[2][1]).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_layers": [3]}, r"skip_layers has \[3\]; this model's layers are 0..2"),
        ({"skip_layers": []}, "skip_layers is empty"),
        (
            {"skip_layers": [1], "guidance": 1.0, **dict.fromkeys(text(sign="negative_"))},
            "skip_layers acts with guidance above 1; it is 1",
        ),
        ({"height": 72}, "72 x 64 pixels: both must be multiples of 16"),
    ],
)
def test_input_that_does_not_fit_is_refused(pipeline, options, message):
    with pytest.raises(UserError, match=message):
        latents(pipeline, **options)


def test_a_range_that_is_none():
    with pytest.raises(UserError, match=r"acts from 0\.5 to 0\.2; expected a range within 0"):
        SkipLayers((1,), start=0.5)


def test_a_saved_pipeline_is_the_same_whoever_reads_it(pipeline, drawn, tmp_path):
    pipeline.save(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model", "float32")
    assert loaded.family is SD3
    assert isinstance(SD3Pipeline.from_pretrained(tmp_path / "model"), SD3Pipeline)
    assert loaded.settings == pipeline.settings
    np.testing.assert_array_equal(latents(loaded), drawn)
    with pytest.raises(UserError, match="is of kind sd3; FluxPipeline reads flux"):
        FluxPipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"no pipeline folder: it has no pipeline\.json"):
        Pipeline.from_pretrained(tmp_path)
