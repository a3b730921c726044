"""How FLUX reads prompts: which encoders it takes, and what of other pipelines it refuses."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux.text import FluxText, read_text
from taca_jax.nn.kinds import abstract_model
from taca_jax.text.clip import CLIP_L
from taca_jax.text.encoders import T5Text
from taca_jax.text.t5 import T5_XXL
from tests.models import CLIP, FLUX, T5
from tests.random_models import random_model
from tests.text.abstract import outputs_of, stored

OWN_CLIP, OWN_T5 = replace(CLIP, dim=FLUX.pooled_dim), replace(T5, dim=FLUX.txt_dim)


def test_full_size_text_has_the_released_shapes():
    clip, t5 = (abstract_model(config, dtype=jnp.bfloat16) for config in (CLIP_L, T5_XXL))
    text = outputs_of(FluxText(clip, t5), 77 + 512)
    assert (text.txt.shape, text.pooled.shape) == ((2, 512, 4096), (2, 768))
    assert text.txt.dtype == text.pooled.dtype == jnp.float32
    marked = np.zeros((1, 77 + 512), bool)
    marked[0, [3, 77 + 9]] = True  # the first is CLIP's, which makes no token of its own
    tokens = FluxText(clip, t5).embedded(jnp.asarray(marked))
    assert tokens.shape == (1, 512)
    assert np.flatnonzero(tokens).tolist() == [9]


def test_clip_and_t5_are_read_in_whichever_folders_they_are():
    for folders in (("text_encoder", "text_encoder_2"), ("text_encoder_2", "text_encoder_3")):
        reading = read_text(FLUX, stored(**dict(zip(folders, (OWN_CLIP, OWN_T5), strict=True))))
        assert reading is not None
        assert (reading.folders, reading.tokens) == (folders, 7)
    clip, t5 = random_model(OWN_CLIP), random_model(OWN_T5)
    made = reading.join((clip, t5), 0)
    assert isinstance(made, FluxText)
    assert list(made.encoders) == [clip, t5]


def test_a_t5_alone_reads_for_models_with_its_width():
    assert read_text(FLUX, stored(text_encoder=OWN_T5)) is None  # pooled embeddings are CLIP's
    alone = replace(FLUX, pooled_dim=FLUX.txt_dim)
    reading = read_text(alone, stored(text_encoder=OWN_T5))
    assert reading is not None
    made = reading.join((random_model(OWN_T5),), 3)
    assert isinstance(made, T5Text)
    assert made.pad_id == 3


def test_encoders_that_do_not_belong_to_the_transformer():
    assert read_text(FLUX, stored(text_encoder=OWN_CLIP)) is None
    with pytest.raises(UserError, match="text_encoder is 8 wide, the transformer reads 4; it is"):
        read_text(FLUX, stored(text_encoder=CLIP, text_encoder_2=OWN_T5))
    with pytest.raises(UserError, match="text_encoder_2 is 8 wide, the transformer reads 6"):
        read_text(FLUX, stored(text_encoder=OWN_CLIP, text_encoder_2=T5))
    with pytest.raises(UserError, match="has 2 T5 encoders"):
        read_text(FLUX, stored(text_encoder=OWN_T5, text_encoder_2=OWN_T5))
