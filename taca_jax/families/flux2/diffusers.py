"""FLUX.2 transformers as diffusers stores them (`Flux2Transformer2DModel`)."""

from typing import Any

from taca_jax.errors import UserError
from taca_jax.families import diffusers_names
from taca_jax.families.flux2.model import Flux2Config
from taca_jax.formats.key_table import Rule, Table, linear
from taca_jax.formats.scheduler import schedule_of as flow_schedule_of
from taca_jax.formats.settings import Settings, read_settings
from taca_jax.nn.layers import TIMESTEP_CHANNELS
from taca_jax.sampling.schedule import FlowSchedule

CLASS = "Flux2Transformer2DModel"
NORM_EPSILON = 1e-6
PIPELINE_FILE = "model_index.json"
PIPELINES = ("Flux2KleinPipeline", "Flux2Pipeline")
"""Those that draw from text; others edit with reference images, which is not supported."""
SCHEDULE = FlowSchedule(mu="empirical")
"""The noise levels of every released model."""

_DOUBLE, _SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"


def _embedder(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(
        rule
        for n in (1, 2)
        for rule in linear(f"time_guidance_embed.{theirs}.linear_{n}", f"{ours}.linear_{n}")
    )


def _stream(name: str, *, out: str, mlp: str) -> tuple[Rule, ...]:
    ours = f"double_blocks.{name}"
    return (
        *linear(f"{_DOUBLE}.attn.{out}", f"{ours}.out"),
        *linear(f"{_DOUBLE}.{mlp}.linear_in", f"{ours}.mlp_in"),
        *linear(f"{_DOUBLE}.{mlp}.linear_out", f"{ours}.mlp_out"),
    )


TABLE = Table(
    "a FLUX.2 transformer in diffusers' layout",
    (
        *linear("x_embedder", "img_in"),
        *linear("context_embedder", "txt_in"),
        *_embedder("timestep_embedder", "time_in"),
        *_embedder("guidance_embedder", "guidance_in"),
        *linear("double_stream_modulation_img.linear", "img_mod"),
        *linear("double_stream_modulation_txt.linear", "txt_mod"),
        *linear("single_stream_modulation.linear", "single_mod"),
        *diffusers_names.qkv(f"{_DOUBLE}.attn", "double_blocks.img"),
        *diffusers_names.txt_qkv(_DOUBLE, "double_blocks"),
        *_stream("img", out="to_out.0", mlp="ff"),
        *_stream("txt", out="to_add_out", mlp="ff_context"),
        *linear(f"{_SINGLE}.attn.to_qkv_mlp_proj", "single_blocks.qkv_mlp"),
        Rule(f"{_SINGLE}.attn.norm_q.weight", "single_blocks.q_norm.scale"),
        Rule(f"{_SINGLE}.attn.norm_k.weight", "single_blocks.k_norm.scale"),
        *linear(f"{_SINGLE}.attn.to_out", "single_blocks.out"),
        *diffusers_names.output_modulation("norm_out", "final_mod"),
        *linear("proj_out", "final_out"),
    ),
)


def config_of(settings: Settings) -> Flux2Config:
    """The config that diffusers' config.json describes.

    Whether the model is distilled, diffusers says in the model_index.json of the pipeline; of a
    transformer alone it is not known, and taken for a base model. Raises UserError for another
    class, for a pipeline that edits with reference images, and for options that no FLUX.2 uses.
    """
    settings.expect("_class_name", CLASS)
    settings.expect("patch_size", 1)
    settings.expect("out_channels", settings["in_channels"])
    settings.expect("eps", NORM_EPSILON)
    settings.expect("timestep_guidance_channels", TIMESTEP_CHANNELS)
    values = {
        "latent_channels": settings["in_channels"],
        "num_heads": settings["num_attention_heads"],
        "head_dim": settings["attention_head_dim"],
        "axes_dim": settings.get("axes_dims_rope", (32, 32, 32, 32)),
        "theta": settings.get("rope_theta", 2000),
        "num_double_blocks": settings["num_layers"],
        "num_single_blocks": settings["num_single_layers"],
        "mlp_ratio": settings.get("mlp_ratio", 3.0),
        "txt_dim": settings["joint_attention_dim"],
        "guidance_embed": settings["guidance_embeds"],
        "distilled": _is_distilled(settings),
    }
    return settings.build(Flux2Config, values)


def _is_distilled(settings: Settings) -> bool:
    folder = settings.where.parent.parent
    if not (folder / PIPELINE_FILE).is_file():
        return False
    index = read_settings(folder, PIPELINE_FILE)
    index.expect("_class_name", *PIPELINES)
    return index.get("is_distilled", False)


def settings_of(config: Flux2Config) -> dict[str, Any]:
    """diffusers' config.json for a config."""
    return {
        "_class_name": CLASS,
        "patch_size": 1,
        "in_channels": config.latent_channels,
        "out_channels": None,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.txt_dim,
        "timestep_guidance_channels": TIMESTEP_CHANNELS,
        "mlp_ratio": config.mlp_ratio,
        "axes_dims_rope": list(config.axes_dim),
        "rope_theta": config.theta,
        "eps": NORM_EPSILON,
        "guidance_embeds": config.guidance_embed,
    }


def schedule_of(settings: Settings) -> FlowSchedule:
    """The noise levels of diffusers' FLUX.2 pipelines, which do not use the shifts that
    scheduler_config.json has.

    Raises UserError as `formats.scheduler` does, and for a constant shift.
    """
    if flow_schedule_of(settings).shift is not None:
        raise UserError(f"{settings.where} shifts by a constant; FLUX.2 by the size and the steps")
    return SCHEDULE
