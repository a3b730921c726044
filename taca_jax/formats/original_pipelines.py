"""Original weights of a whole pipeline: a diffusers folder, or a single file and what is beside it.

Nothing is read here but headers and settings.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taca_jax.formats import flux_diffusers, sd3_diffusers, vae_bfl
from taca_jax.formats.settings import read_settings
from taca_jax.formats.sources import (
    VAE_PREFIXES,
    Source,
    bare_clip,
    bare_t5,
    check_unscaled,
    original_vae,
    others,
    sd3,
    text_encoder,
    transformer,
    vae,
)
from taca_jax.models.sd3 import SD3Config
from taca_jax.sampling import FlowSchedule
from taca_jax.tensor_files import TensorFiles, open_tensors, under

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
"""As diffusers names them, and we: what each is, its config.json says."""

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
    noise levels. notes: lines that say what was taken for want of something better.
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
    schedule = published_schedule(sources["transformer"].config)
    if not (src / "scheduler").is_dir():
        note = f"{src} has no scheduler/; the published noise levels are taken: {schedule}"
        return OriginalPipeline(sources, schedule, (note,))
    settings = read_settings(src / "scheduler", "scheduler_config.json")
    is_sd3 = isinstance(sources["transformer"].config, SD3Config)
    read_schedule = sd3_diffusers.schedule_of if is_sd3 else flux_diffusers.schedule_of
    return OriginalPipeline(sources, read_schedule(settings))


def published_schedule(config: Any) -> FlowSchedule:
    """The noise levels of the released model of a transformer's config."""
    if isinstance(config, SD3Config):
        return sd3_diffusers.SCHEDULE
    return flux_diffusers.published_schedule(config)


def sd3_parts(src: Path) -> dict[str, Source]:
    """Every model in a single file of Stability AI's, by the name of its folder in a pipeline's."""
    parts = {"transformer": sd3(src)}
    tensors = open_tensors(src)
    for prefix, _ in VAE_PREFIXES:
        if prefix and vae_bfl.is_autoencoder(found := under(tensors, prefix)):
            parts["autoencoder"] = original_vae(found, "sd3")
    for prefix, (made, read) in TEXT_PREFIXES.items():
        found = under(tensors, prefix)
        if found.shapes:
            check_unscaled(found)
            parts[made] = read(found)
    left_out = others(tensors, *(part.tensors for part in parts.values()))
    return parts | {"transformer": dataclasses.replace(parts["transformer"], left_out=left_out)}
