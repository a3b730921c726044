"""Previews of a sampling run: pictures of its predicted result after each step."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from PIL import Image

from taca_jax.autoencoders.kinds import Autoencoder, AutoencoderConfig
from taca_jax.autoencoders.pixels import Pixels, PixelsConfig
from taca_jax.autoencoders.tiny_vae import TinyVAE, TinyVAEConfig
from taca_jax.errors import UserError
from taca_jax.nn.kinds import kind_of
from taca_jax.pipelines.decoding import decode, to_pil
from taca_jax.sampling.loop import Sampled
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import StoredModel, open_autoencoder

Previewer = Pixels | TinyVAE
Callback = Callable[[int, jax.Array], None]
"""Takes the step, counted from 0, and the latents after it."""
Preview = Callable[[int, list[Image.Image]], None]
"""Takes the step, counted from 0, and a picture of each sample's predicted result."""


OWN = "own"
"""In place of a previewer's path: the model's own autoencoder."""


def watcher(
    advance: Callable[[], None] | None,
    callback: Callback | None,
    draw: Callable[[int, Sampled], None] | None,
) -> Callable[[int, Sampled], None] | None:
    """A function that does all of these after a step; None if there is nothing to do."""
    if advance is None and callback is None and draw is None:
        return None

    def watch(step: int, now: Sampled) -> None:
        jax.block_until_ready(now.latents)  # else the bar would run ahead of the device
        if callback is not None:
            callback(step, now.latents)
        if draw is not None:
            draw(step, now)
        if advance is not None:
            advance()

    return watch


def drawer(
    preview: Preview | None, previewer: Previewer | None, autoencoder: Autoencoder | None, name: str
) -> Callable[[int, Sampled], None] | None:
    """A function that calls `preview` with pictures of the predicted x0; None without `preview`.

    They are decoded by `previewer`, or by the model's own autoencoder if that is small. Raises
    UserError if there is neither; `name` is the published previewer of the model's family.
    """
    if preview is None:
        return None
    if previewer is None:
        check_own_previewer(None if autoencoder is None else autoencoder.config, name)
        assert isinstance(autoencoder, Pixels | TinyVAE)  # which has been checked
        previewer = autoencoder
    return lambda step, now: preview(step, to_pil(decode(previewer, now.x0, None)))


def check_own_previewer(autoencoder: AutoencoderConfig | None, name: str) -> None:
    """Raises UserError unless a model's own autoencoder, of this config, is small enough to draw
    previews; `name` is the published previewer of the model's family."""
    if not isinstance(autoencoder, PixelsConfig | TinyVAEConfig):
        raise UserError(
            f"previews are drawn by a tiny autoencoder ({name} for this model), and there is none; "
            "give preview=PATH, from Python load_previewer(PATH)"
        )


def open_previewer(path: str | Path, latent_channels: int | None = None) -> StoredModel:
    """A TAESD-style autoencoder, not loaded yet: a converted folder, its two published files, or
    its hub id.

    Raises UserError if it is missing, damaged, of another kind, or has not the `latent_channels` of
    the model, where they are given.
    """
    stored = open_autoencoder(path)
    if not isinstance(stored.config, TinyVAEConfig):
        raise UserError(f"{path} is of a {kind_of(stored.config).name}; previews take a tiny_vae")
    given = stored.config.latent_channels
    if latent_channels not in (None, given):
        raise UserError(
            f"{path} has {given} latent channels, the transformer expects {latent_channels}; it is "
            "of another model"
        )
    return stored


def read_previewer(path: str | Path, latent_channels: int, mesh: Mesh | None = None) -> TinyVAE:
    """Loads a TAESD-style autoencoder in float32, onto a mesh or the first device.

    Raises UserError as `open_previewer` does.
    """
    stored = open_previewer(path, latent_channels)
    return stored.load(LoadOptions(dtype=jnp.float32, param_dtype=jnp.float32, mesh=mesh))
