"""Draws pictures in one way of sampling, and measures the attention that they pay to text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.attention_maps.shares import shares_of_step
from taca_jax.evaluation.shapes.recogniser import check
from taca_jax.formats.atomic import whole_file
from taca_jax.nn.conditioning import Conditioning
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import on_host
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.decoding import eight_bit
from taca_jax.pipelines.loras import acting_loras
from taca_jax.pipelines.pipeline import Embeds, Pipeline
from taca_jax.sampling.loop import Plan, make_plan
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


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together, and what is read of their prompts.

    prompts: of each sample; the last batch is filled up with copies, so that all batches run the
    same compiled program. first: the number of its first picture. count: of samples that are no
    copies. shown: the first pictures, of which maps are kept. words: of the first prompt, the text
    tokens of each; in other prompts' pictures none.
    """

    prompts: list[str]
    first: int
    count: int
    shown: int
    embeds: Embeds
    text: Conditioning
    words: Bool[Array, "b w t"]


def read_batches(pipeline: Pipeline, config: AttentionConfig, words: Sequence[str]) -> list[Batch]:
    """All batches of an analysis, in the order of their pictures: nothing is drawn, and of a
    pipeline in stages only the text encoders are read.

    Raises UserError for prompts that the model cannot read, and words that the first one lacks.
    """
    prompts = [prompt for prompt in config.prompts for _ in range(config.num_images)]
    size = min(config.batch_size, len(prompts))
    batches = []
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        count = len(batch)
        batch += batch[-1:] * (size - count)
        text = conditioning(pipeline, batch, config.guidance)
        of_first = max(0, min(config.num_images - first, count))
        marked = [
            tokens_of_words(pipeline, config.prompts[0], words, of_first),
            jnp.zeros((size - of_first, len(words), text.txt.shape[1]), bool),
        ]
        batches.append(
            Batch(
                *(batch, first, count, min(_SHOWN, config.num_images, count)),
                embeds=pipeline.embeds(batch, config.negative_prompt, guidance=config.guidance),
                text=text,
                words=jnp.concatenate(marked),
            )
        )
    return batches


@dataclass(frozen=True)
class _Drawn:
    """A batch in one variant before decoding. Arrays are as in Measured, with latents in place of
    pictures; `x0` has those of all steps and samples."""

    heads: Float[np.ndarray, "n p g l h"]
    maps: Float[np.ndarray, "n k g r c"]
    x0: Float[np.ndarray, "n p h w c"]
    final: Float[np.ndarray, "k h w c"]


def measure(
    pipeline: Pipeline,
    config: AttentionConfig,
    variant: Variant,
    batches: Sequence[Batch],
    *,
    are_shapes: bool,
    advance: Callable[[], None],
) -> Measured:
    """Draws all pictures in one variant, picture i from the same noise as in any other.

    They are those of an unobserved run, bit for bit: they are drawn by the same program, and the
    latents of each step then go through the transformer once more. A pipeline in stages reads its
    transformer once, and then its autoencoder. are_shapes: whether prompts and pictures are of the
    shapes data, so that claims can be checked. `advance` is called after each step of each batch.
    """
    sigmas = pipeline.sigmas(config.height, config.width, config.steps)
    loras = acting_loras(pipeline.transformer, pipeline.loras, variant.lora_strength)
    plan = make_plan(sigmas, variant.taca, loras=loras)
    drawn = [_draw(pipeline, config, variant, plan, batch, advance) for batch in batches]
    steps, first = len(sigmas) - 1, drawn[0]  # what is shown is in the first batch
    shown = len(first.final)
    film_steps = _spread(steps, _FILM)
    return Measured(
        gamma=np.asarray(plan.gamma),
        heads=np.concatenate([each.heads for each in drawn], axis=1),
        maps=first.maps,
        film_steps=film_steps,
        film=np.stack([_pictures(pipeline, first.x0[step, :shown]) for step in film_steps]),
        drawn=_pictures(pipeline, first.final),
        claims=np.concatenate(
            [
                _claims(pipeline, each, batch) if are_shapes else np.zeros((0, batch.count))
                for each, batch in zip(drawn, batches, strict=True)
            ],
            axis=1,
        ).astype(np.float32),
    )


def _draw(
    pipeline: Pipeline,
    config: AttentionConfig,
    variant: Variant,
    plan: Plan,
    batch: Batch,
    advance: Callable[[], None],
) -> _Drawn:
    size, seed = len(batch.prompts), config.seed + batch.first
    noise = pipeline.noise(size, config.height, config.width, seed)
    out = pipeline(
        **batch.embeds,
        steps=config.steps,
        guidance=config.guidance,
        taca=variant.taca,
        lora_strength=variant.lora_strength,
        latents=noise,
        output="latents",
        trajectory=True,
        progress=False,
    )
    assert out.trajectory is not None
    grid = [side // pipeline.config.patch_size for side in noise.shape[1:3]]
    # All from the host: JAX would compile once more for latents that are bound to a device.
    before = np.concatenate([on_host(noise)[None], on_host(out.trajectory.latents[:-1])])
    heads, maps = [], []
    for step, latents in enumerate(before):
        with on(pipeline.mesh):
            shares = shares_of_step(
                pipeline.transformer,
                batch.text,
                jnp.asarray(latents),
                jax.tree.map(lambda x, step=step: x[step], plan),
                batch.words,
                layer=config.layer,
            )
        heads.append(np.asarray(shares.heads[: batch.count]))
        places = np.asarray(shares.places[: batch.shown])
        maps.append(places.reshape(*places.shape[:2], *grid))
        advance()
    return _Drawn(
        heads=np.stack(heads),
        maps=np.stack(maps),
        x0=on_host(out.trajectory.x0[:, : batch.count]),
        final=on_host(out.latents[: batch.shown]),
    )


def _claims(pipeline: Pipeline, drawn: _Drawn, batch: Batch) -> Float[np.ndarray, "n p"]:
    prompts = batch.prompts[: batch.count]
    return np.array(
        [
            [_right(*pair) for pair in zip(prompts, _pictures(pipeline, x0), strict=True)]
            for x0 in drawn.x0
        ]
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
    if not pipeline.family.embeds_guidance(pipeline.config):
        return text
    strength = pipeline.settings.guidance if guidance is None else guidance
    return replace(text, guidance=jnp.full(len(prompts), strength, jnp.float32))


def _spread(count: int, most: int) -> Int[np.ndarray, " n"]:
    """At most `most` of the numbers 0 to count - 1, evenly, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _pictures(
    pipeline: Pipeline, latents: Float[np.ndarray, "b h w c"]
) -> UInt8[np.ndarray, "b H W 3"]:
    images = pipeline.decode(jnp.asarray(latents), output="array")
    assert isinstance(images, np.ndarray)  # for output="array"
    return eight_bit(images)


def _right(prompt: str, picture: UInt8[np.ndarray, "H W 3"]) -> float:
    """The share of a prompt's claims that hold in a picture of shapes."""
    claims = check(prompt, picture).claims
    return sum(holds for _, holds in claims) / len(claims)
