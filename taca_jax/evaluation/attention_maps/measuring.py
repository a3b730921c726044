"""Draws pictures in one way of sampling, and measures the attention that they pay to text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from taca_jax.autoencoders.tiling import TILING
from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.attention_maps.shares import shares_of_step
from taca_jax.evaluation.shapes.recogniser import check
from taca_jax.formats.atomic import whole_file
from taca_jax.nn.conditioning import Conditioning
from taca_jax.parallel.mesh import on
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.decoding import decode, eight_bit
from taca_jax.pipelines.loras import acting_loras
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.sampling.loop import make_plan
from taca_jax.text.words import ids_of_word

_SHOWN = 2
"""Pictures, at most, of which maps are kept; they are the first of the first prompt."""

_FILM = 8
"""Steps, at most, of which predicted pictures are kept."""


@dataclass(frozen=True)
class Measured:
    """What was seen of n sampling steps of p pictures, the first k of which are shown.

    Shares, 0 to 1, are of the attention of image queries, and of g groups of text tokens: all of
    them, and then those of each word of the first prompt; words have no share in other prompts'
    pictures.

    gamma: TACA's temperature. heads: shares in l layers of h heads, means over image positions.
    maps: shares at each of r x c image positions, means over heads and layers (or one layer's
    heads). film_steps: the steps, counted from 0, whose predicted pictures are `film`. drawn: the
    final pictures. claims: how much, 0 to 1, of what its prompt says each predicted picture shows;
    of no step where that cannot be read.
    """

    gamma: Float[np.ndarray, " n"]
    heads: Float[np.ndarray, "n p g l h"]
    maps: Float[np.ndarray, "n k g r c"]
    film_steps: Int[np.ndarray, " f"]
    film: UInt8[np.ndarray, "f k H W 3"]
    drawn: UInt8[np.ndarray, "k H W 3"]
    claims: Float[np.ndarray, "n p"]

    @property
    def text(self) -> Float[np.ndarray, "n p"]:
        """The share of all text, mean over layers, heads and positions.

        In plain cross-attention, a softmax over text keys alone, it would be 1: it thus is the
        strength of the joint attention's text part relative to that, as in the paper's figure 4.
        """
        return self.heads[:, :, 0].mean(axis=(2, 3))

    def save(self, path: Path) -> None:
        """Writes all arrays by their names, as an .npz file."""
        with whole_file(path) as made, made.open("wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def measure(
    pipeline: Pipeline,
    config: AttentionConfig,
    variant: Variant,
    words: Sequence[str],
    *,
    are_shapes: bool,
    advance: Callable[[], None],
) -> Measured:
    """Draws all pictures in one variant, picture i from the same noise as in any other.

    They are those of an unobserved run, bit for bit: they are drawn by the same program, and the
    latents of each step then go through the transformer once more. words: of the first prompt.
    are_shapes: whether prompts and pictures are of the shapes data, so that claims can be checked.
    `advance` is called after each step of each batch.
    """
    prompts = [prompt for prompt in config.prompts for _ in range(config.num_images)]
    batches = [
        _measure_batch(
            *(pipeline, config, variant, prompts, words, start),
            are_shapes=are_shapes,
            advance=advance,
        )
        for start in range(0, len(prompts), config.batch_size)
    ]
    # What is shown is in the first batch; these are of all pictures.
    return replace(
        batches[0],
        heads=np.concatenate([batch.heads for batch in batches], axis=1),
        claims=np.concatenate([batch.claims for batch in batches], axis=1),
    )


def _measure_batch(
    pipeline: Pipeline,
    config: AttentionConfig,
    variant: Variant,
    prompts: Sequence[str],
    words: Sequence[str],
    start: int,
    *,
    are_shapes: bool,
    advance: Callable[[], None],
) -> Measured:
    """The pictures from `start` on, as many as a batch has."""
    batch = list(prompts[start : start + config.batch_size])
    count = len(batch)
    # The last batch is padded, so that all batches run the same compiled program.
    batch += batch[-1:] * (min(config.batch_size, len(prompts)) - count)
    of_first = max(0, min(config.num_images - start, count))
    shown = min(_SHOWN, config.num_images, count)
    noise = pipeline.noise(len(batch), config.height, config.width, config.seed + start)
    out = pipeline(
        batch,
        config.negative_prompt,
        steps=config.steps,
        guidance=config.guidance,
        taca=variant.taca,
        lora_strength=variant.lora_strength,
        latents=noise,
        output="array",
        trajectory=True,
        progress=False,
    )
    assert out.trajectory is not None
    assert isinstance(out.images, np.ndarray)
    sigmas = pipeline.sigmas(config.height, config.width, config.steps)
    loras = acting_loras(pipeline.transformer, pipeline.loras, variant.lora_strength)
    plan = make_plan(sigmas, variant.taca, loras=loras)
    text = conditioning(pipeline, batch, config.guidance)
    groups = jnp.concatenate(
        [
            tokens_of_words(pipeline, config.prompts[0], words, of_first),
            jnp.zeros((len(batch) - of_first, len(words), text.txt.shape[1]), bool),
        ]
    )
    grid = [side // pipeline.transformer.config.patch_size for side in noise.shape[1:3]]
    heads, maps = [], []
    for step, latents in enumerate([noise, *out.trajectory.latents[:-1]]):
        with on(pipeline.mesh):
            shares = shares_of_step(
                pipeline.transformer,
                text,
                latents,
                jax.tree.map(lambda x, step=step: x[step], plan),
                groups,
                layer=config.layer,
            )
        heads.append(np.asarray(shares.heads[:count]))
        places = np.asarray(shares.places[:shown])
        maps.append(places.reshape(*places.shape[:2], *grid))
        advance()
    film_steps = _spread(len(heads), _FILM)
    x0 = out.trajectory.x0
    film = [_pictures(pipeline, x0[step, :shown]) for step in film_steps]
    claims = []
    for step in range(len(heads) if are_shapes else 0):
        pictures = _pictures(pipeline, x0[step, :count])
        claims.append([_right(*pair) for pair in zip(batch[:count], pictures, strict=True)])
    return Measured(
        gamma=np.asarray(plan.gamma),
        heads=np.stack(heads),
        maps=np.stack(maps),
        film_steps=film_steps,
        film=np.stack(film),
        drawn=eight_bit(out.images[:shown]),
        claims=np.array(claims, np.float32).reshape(-1, count),
    )


def tokens_of_words(
    pipeline: Pipeline, prompt: str, words: Sequence[str], count: int
) -> Bool[Array, "b w t"]:
    """Which of the transformer's text tokens stand for each word of a prompt, `count` times.

    Raises UserError for a word that the prompt does not contain.
    """
    assert pipeline.tokenizer is not None  # prompts have been encoded
    assert pipeline.text_encoder is not None
    ids = [ids_of_word(pipeline.tokenizer, prompt, word) for word in words]
    marked = np.array(ids, bool).reshape(len(words), pipeline.tokenizer.length)
    tokens = pipeline.text_encoder.embedded(jnp.asarray(marked))
    return jnp.broadcast_to(tokens, (count, *tokens.shape))


def conditioning(
    pipeline: Pipeline, prompts: Sequence[str], guidance: float | None
) -> Conditioning:
    """The positive prompts as a call of the pipeline gives them to its transformer."""
    text = pipeline.encode_prompts(prompts)
    if not pipeline.family.embeds_guidance(pipeline.transformer.config):
        return text
    strength = pipeline.settings.guidance if guidance is None else guidance
    return replace(text, guidance=jnp.full(len(prompts), strength, jnp.float32))


def _spread(count: int, most: int) -> Int[np.ndarray, " n"]:
    """At most `most` of the numbers 0 to count - 1, evenly, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _pictures(pipeline: Pipeline, latents: Float[Array, "b h w c"]) -> UInt8[np.ndarray, "b H W 3"]:
    assert pipeline.autoencoder is not None  # final pictures have been decoded
    return eight_bit(decode(pipeline.autoencoder, latents, TILING))


def _right(prompt: str, picture: UInt8[np.ndarray, "H W 3"]) -> float:
    """The share of a prompt's claims that hold in a picture of shapes."""
    claims = check(prompt, picture).claims
    return sum(holds for _, holds in claims) / len(claims)
