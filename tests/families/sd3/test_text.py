"""How Stable Diffusion 3 reads prompts: two CLIPs, with or without a T5."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.sd3.model import SD35_MEDIUM
from taca_jax.families.sd3.text import SD3Text, read_text
from taca_jax.nn.kinds import abstract_model
from taca_jax.text.clip import CLIP_BIGG, CLIP_L
from taca_jax.text.t5 import T5_XXL
from tests.text.abstract import outputs_of, stored

OWN = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_BIGG, "text_encoder_3": T5_XXL}


@pytest.mark.parametrize(("t5_config", "count"), [(T5_XXL, 256), (None, 0)])
def test_full_size_text_has_the_released_shapes(t5_config, count):
    encoders = [
        None if config is None else abstract_model(config, dtype=jnp.bfloat16)
        for config in (CLIP_L, CLIP_BIGG, t5_config)
    ]
    text = outputs_of(SD3Text(*encoders, width=4096, t5_length=256), 154 + count)
    assert (text.txt.shape, text.pooled.shape) == ((2, 77 + 256, 4096), (2, 2048))
    assert text.txt.dtype == text.pooled.dtype == jnp.float32


def test_a_t5_may_be_left_out_and_no_clip():
    reading = read_text(SD35_MEDIUM, stored(**OWN))
    assert reading is not None
    assert (reading.folders, reading.tokens) == (tuple(OWN), 77 + 7)
    without = read_text(SD35_MEDIUM, stored(text_encoder=CLIP_L, text_encoder_2=CLIP_BIGG))
    assert without is not None
    assert (without.folders, without.tokens) == (tuple(OWN)[:2], 77 + 7)
    clips = [abstract_model(config, dtype=jnp.float32) for config in (CLIP_L, CLIP_BIGG)]
    made = without.join(clips, 0)
    assert isinstance(made, SD3Text)
    assert list(made.encoders) == clips
    assert (made.width, made.t5_length) == (4096, 7)
    assert read_text(SD35_MEDIUM, stored(text_encoder=CLIP_L, text_encoder_3=T5_XXL)) is None


@pytest.mark.parametrize("t5", [None, T5_XXL])
def test_marked_ids_are_at_their_embeddings(t5):
    """The ids of both CLIPs share their text tokens; T5's come behind."""
    encoders = [
        None if config is None else abstract_model(config, dtype=jnp.float32)
        for config in (CLIP_L, CLIP_BIGG, t5)
    ]
    text = SD3Text(*encoders, width=4096, t5_length=256)
    marked = np.zeros((2, 77 + 77 + (256 if t5 else 0)), bool)
    marked[0, [3, 77 + 5]] = marked[1, 77 + 76] = True
    if t5:
        marked[0, 154 + 9] = True
    tokens = text.embedded(jnp.asarray(marked))
    assert tokens.shape == (2, 77 + 256)
    places = [np.flatnonzero(row).tolist() for row in tokens]
    assert places == [[3, 5, 77 + 9] if t5 else [3, 5], [76]]


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"text_encoder": replace(CLIP_L, projection_dim=None)}, {}, "first CLIP of .* has no pro"),
        ({}, {"txt_dim": 2000}, "text_encoder_3 is 4096 wide, the transformer reads 2000"),
        (
            {"text_encoder_3": replace(T5_XXL, dim=2000)},
            {"txt_dim": 2000},
            "the two CLIPs of .* are 2048 wide together; the transformer reads 2000",
        ),
        ({}, {"pooled_dim": 768}, "make a pooled embedding of 2048, the transformer reads 768"),
    ],
)
def test_encoders_that_it_cannot_read_with_are_refused(changes, config, message):
    with pytest.raises(UserError, match=message):
        read_text(replace(SD35_MEDIUM, **config), stored(**OWN | changes))
