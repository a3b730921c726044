"""What is shown of a run while it goes on: a bar, and pictures of where it is heading."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from PIL import Image

from taca_jax.autoencoders.pixels import Pixels
from taca_jax.autoencoders.tiny_vae import TinyVAE, TinyVAEConfig
from taca_jax.errors import UserError
from taca_jax.formats import engine
from taca_jax.pipelines.decoding import Autoencoder, decode, to_pil
from taca_jax.sampling.loop import Sampled
from taca_jax.weights.folders import CONFIG, kind_of, load_config, load_model
from taca_jax.weights.originals import tiny_vae

Previewer = Pixels | TinyVAE
Callback = Callable[[int, jax.Array], None]
"""Takes the step, from 0, and the latents after it."""
Preview = Callable[[int, list[Image.Image]], None]
"""Takes the step, from 0, and a picture of each sample as it is predicted to become."""


def watcher(
    advance: Callable[[], None] | None,
    callback: Callback | None,
    preview: Preview | None,
    previewer: Previewer | None,
) -> Callable[[int, Sampled], None] | None:
    """What does all of these after a step; None where there is nothing to do."""
    if advance is None and callback is None and preview is None:
        return None

    def watch(step: int, now: Sampled) -> None:
        jax.block_until_ready(now.latents)  # else the bar would show what is asked for, not done
        if callback is not None:
            callback(step, now.latents)
        if preview is not None:
            assert previewer is not None  # find_previewer saw to it
            preview(step, to_pil(decode(previewer, now.x0, None)))
        if advance is not None:
            advance()

    return watch


def find_previewer(previewer: Previewer | None, autoencoder: Autoencoder | None) -> Previewer:
    """What previews are drawn with: the one loaded for it, else an autoencoder that is small too.

    Raises UserError where there is none.
    """
    if previewer is not None:
        return previewer
    if isinstance(autoencoder, Pixels | TinyVAE):
        return autoencoder
    raise UserError(
        "previews are drawn by a tiny autoencoder (TAEF1 for FLUX.1, TAESD3 for Stable Diffusion "
        "3), and there is none; load_previewer(PATH) reads one"
    )


def check_previewer(path: Path) -> TinyVAEConfig:
    """The config of a TAESD-style autoencoder: a converted folder, or its two published files.

    Raises UserError where it is missing, damaged or of another kind.
    """
    config = load_config(path) if (path / CONFIG).is_file() else tiny_vae(path).config
    if not isinstance(config, TinyVAEConfig):
        raise UserError(f"{path} is of a {kind_of(config)}; previews take a tiny_vae")
    return config


def read_previewer(path: Path, latent_channels: int) -> TinyVAE:
    """What `check_previewer` finds, in float32. Raises as it does, and for other latents."""
    given = check_previewer(path).latent_channels
    if given != latent_channels:
        raise UserError(
            f"{path} has {given} latent channels, the transformer expects {latent_channels}; it is "
            "of another model"
        )
    types = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    if (path / CONFIG).is_file():
        return load_model(path, **types)
    source = tiny_vae(path)
    return engine.load(source.table, source.tensors, source.config, **types)
