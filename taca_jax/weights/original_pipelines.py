"""Original weights of a whole pipeline: a diffusers folder, or a single file and what is beside it.

Nothing is read here but headers and settings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.errors import UserError
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.families.sd3 import stability as sd3_native
from taca_jax.families.sd3.model import SD3Config
from taca_jax.formats.settings import read_settings
from taca_jax.formats.tensor_files import TensorFiles, open_tensors, under
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.weights.folders import CONFIG
from taca_jax.weights.originals import (
    VAE_PREFIXES,
    Latents,
    Source,
    bare_clip,
    bare_t5,
    flux,
    original_vae,
    others,
    sd3,
    text_encoder,
    transformer,
    vae,
)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""As diffusers names them, and we: what each is, its config.json says."""

BFL_AUTOENCODER = "ae.safetensors"
"""As it lies beside FLUX's single files."""

PIPELINE_PARTS = (
    ("transformer", "transformer", transformer),
    ("vae", "autoencoder", vae),
    *((name, name, text_encoder) for name in TEXT_ENCODERS),
)
"""diffusers' folder -> ours."""

TEXT_PREFIXES: Mapping[str, tuple[str, Callable[[TensorFiles], Source]]] = {
    "text_encoders.clip_l.transformer.": ("text_encoder", bare_clip),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", bare_clip),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", bare_t5),
}
"""Within Stability's and ComfyUI's checkpoints."""


@dataclass(frozen=True)
class OriginalPipeline:
    """Original weights of a pipeline.

    sources: its models by the name of their folder in a pipeline's of ours. schedule: the sampler's
    noise levels. notes: lines that say what is not there, and what was taken instead.
    """

    sources: Mapping[str, Source]
    schedule: FlowSchedule
    notes: tuple[str, ...] = ()

    @property
    def call(self) -> dict[str, Any]:
        """What a call takes that names nothing: text_length, resolution, steps, guidance."""
        config = self.sources["transformer"].config
        if isinstance(config, SD3Config):
            return sd3_diffusers.call_of(config)
        return flux_diffusers.DEV_CALL if config.guidance_embed else flux_diffusers.SCHNELL_CALL


def open_folder(
    src: Path, read_transformer: Callable[[Path], Source] = transformer
) -> OriginalPipeline:
    """A diffusers pipeline folder, every part of which is checked, bar the tensors themselves.

    Raises UserError for parts that are damaged or of no model that is known.
    """
    sources = {"transformer": read_transformer(src / "transformer")}
    for name, made, read in PIPELINE_PARTS[1:]:
        if (src / name).is_dir():
            sources[made] = read(src / name)
    is_sd3 = isinstance(sources["transformer"].config, SD3Config)
    encoders = TEXT_ENCODERS if is_sd3 else TEXT_ENCODERS[:2]
    notes = []
    if absent := [
        name for name in (*encoders, *TOKENIZERS[: len(encoders)]) if not (src / name).is_dir()
    ]:
        notes.append(f"{src} has no {', '.join(absent)}, which prompts are read with")
    if not (src / "vae").is_dir():
        notes.append(f"{src} has no vae, which pictures are made with")
    if (src / "scheduler").is_dir():
        settings = read_settings(src / "scheduler", "scheduler_config.json")
        read_schedule = sd3_diffusers.schedule_of if is_sd3 else flux_diffusers.schedule_of
        schedule = read_schedule(settings)
    else:
        schedule = published_schedule(sources["transformer"].config)
        notes.append(f"{src} has no scheduler; the published noise levels are taken: {schedule}")
    return OriginalPipeline(sources, schedule, tuple(notes))


def published_schedule(config: Any) -> FlowSchedule:
    """The noise levels of the released model of a transformer's config."""
    if isinstance(config, SD3Config):
        return sd3_diffusers.SCHEDULE
    return flux_diffusers.published_schedule(config)


def is_original(path: Path) -> bool:
    """Whether it may be opened as the original weights of a pipeline."""
    return path.suffix == ".safetensors" or (path / "transformer" / CONFIG).is_file()


def open_original(path: Path) -> OriginalPipeline:
    """A diffusers pipeline folder, or a single file of Black Forest Labs', Stability AI's or
    ComfyUI's with what is beside it.

    What a file has not within is taken from beside it where it is there: the autoencoder
    (`ae.safetensors` of FLUX, diffusers' `vae/`), and text encoders (`text_encoder/`, ...). Raises
    UserError for a file without a transformer, and as `open_folder` does.
    """
    if path.is_dir():
        return open_folder(path)
    tensors = open_tensors(path)
    is_sd3 = any(sd3_native.is_sd3(under(tensors, prefix)) for prefix in (sd3_native.PREFIX, ""))
    if not is_sd3 and vae_bfl.is_autoencoder(tensors):
        raise UserError(f"{path} is an autoencoder alone; give the transformer's file beside it")
    parts = sd3_parts(path) if is_sd3 else flux_parts(path)
    beside = _beside(path.parent, parts, is_sd3=is_sd3)
    taken = ", ".join(source.tensors.where for source in beside.values())
    notes = (f"{path}: what is not within is taken from beside it: {taken}",) if beside else ()
    sources = {**parts, **beside}
    return OriginalPipeline(sources, published_schedule(sources["transformer"].config), notes)


def _beside(folder: Path, parts: Mapping[str, Source], *, is_sd3: bool) -> dict[str, Source]:
    found = {}
    if "autoencoder" not in parts:
        if not is_sd3 and (folder / BFL_AUTOENCODER).is_file():
            found["autoencoder"] = vae(folder / BFL_AUTOENCODER, "flux")
        elif (folder / "vae" / CONFIG).is_file():
            found["autoencoder"] = vae(folder / "vae")
    for name in TEXT_ENCODERS:
        if name not in parts and (folder / name / CONFIG).is_file():
            found[name] = text_encoder(folder / name)
    return found


def sd3_parts(src: Path) -> dict[str, Source]:
    """Every model in a single file of Stability AI's, by the name of its folder in a pipeline's."""
    return _parts(src, sd3(src), "sd3", TEXT_PREFIXES)


def flux_parts(src: Path) -> dict[str, Source]:
    """Every model in a single file of Black Forest Labs' or ComfyUI's, likewise."""
    clip, _, t5 = TEXT_PREFIXES
    # FLUX's T5 is the second text encoder.
    names = {clip: TEXT_PREFIXES[clip], t5: (TEXT_ENCODERS[1], bare_t5)}
    return _parts(src, flux(src), "flux", names)


def _parts(
    src: Path,
    first: Source,
    latents: Latents,
    text_prefixes: Mapping[str, tuple[str, Callable[[TensorFiles], Source]]],
) -> dict[str, Source]:
    parts = {"transformer": first}
    tensors = open_tensors(src)
    found = []
    for prefix, _ in VAE_PREFIXES:
        if prefix and vae_bfl.is_autoencoder(autoencoder := under(tensors, prefix)):
            parts["autoencoder"] = original_vae(autoencoder, latents)
            found.append(autoencoder)
    for prefix, (made, read) in text_prefixes.items():
        if (encoder := under(tensors, prefix)).shapes:
            parts[made] = read(encoder)
            found.append(encoder)
    rest = set(others(tensors, *found))
    left_out = tuple(name for name in first.left_out if name in rest)
    return parts | {"transformer": dataclasses.replace(first, left_out=left_out)}
