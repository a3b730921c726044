"""The FLUX pipeline: what it does that other families' do not; see tests/pipelines/."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux.pipeline import FluxPipeline
from taca_jax.families.sd3.pipeline import SD3Pipeline
from tests.training.tiny import FLUX, tiny_pipeline

PROMPT = "a red circle and a blue square"


def test_a_model_with_embedded_guidance_takes_a_scale_and_no_negative_prompt():
    pipeline = tiny_pipeline(dataclasses.replace(FLUX, guidance_embed=True))
    weak, strong = (pipeline(PROMPT, guidance=scale, output="array").images for scale in (1.0, 7.0))
    assert np.abs(weak - strong).max() > 1e-4
    with pytest.raises(UserError, match="embeds its guidance and takes no negative prompt"):
        pipeline(PROMPT, "a circle")
    with pytest.raises(UserError, match="embeds its guidance and takes no negative prompt"):
        pipeline(PROMPT, negative_prompt_embeds=jnp.zeros((1, 16, 32)))


def test_it_reads_what_is_saved_and_no_other_family(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save(tmp_path / "model")
    assert isinstance(FluxPipeline.from_pretrained(tmp_path / "model"), FluxPipeline)
    with pytest.raises(UserError, match="is of kind flux; SD3Pipeline reads sd3"):
        SD3Pipeline.from_pretrained(tmp_path / "model")
