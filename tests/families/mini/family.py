"""The third MM-DiT as a family: names of its weights elsewhere, and what calls default to."""

from functools import cache

from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.families.base import (
    CallDefaults,
    DiffusersLayout,
    Family,
    LoRANames,
    OriginalLayout,
    Published,
)
from taca_jax.formats.key_table import Rule, Table, fused_linear, linear
from taca_jax.formats.lora.alphas import PREFIX
from taca_jax.formats.lora.dialect import Dialect, underscored
from taca_jax.formats.lora.kohya import PREFIXES as KOHYA_PREFIXES
from taca_jax.formats.scheduler import schedule_of
from taca_jax.formats.tensor_files import layers_of, shape_of
from taca_jax.nn.blocks import layer_tokens
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text.encoders import T5Text, TextReading
from taca_jax.text.t5 import T5Config
from tests.families.mini.model import MINI_KIND, MiniConfig

TINY = MiniConfig(
    patch_size=4,
    latent_channels=3,
    num_heads=4,
    head_dim=16,
    axes_dim=(4, 6, 6),
    num_blocks=2,
    mlp_ratio=2.0,
    txt_dim=32,
    pooled_dim=32,
)
CLASS = "MiniTransformer2DModel"


def _ends(embed: str) -> tuple[Rule, ...]:
    return (
        *linear("x_embedder", "img_in"),
        *linear("context_embedder", "txt_in"),
        *(
            rule
            for name in ("time_in", "vector_in")
            for n in (1, 2)
            for rule in linear(f"{embed}.{name}.linear_{n}", f"{name}.linear_{n}")
        ),
        *linear("norm_out", "final_mod"),
        *linear("proj_out", "final_out"),
    )


def _stream(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *(
            r
            for n in ("mod", "out", "mlp_in", "mlp_out")
            for r in linear(f"{theirs}.{n}", f"{ours}.{n}")
        ),
        Rule(f"{theirs}.norm_q.weight", f"{ours}.qkv.q_norm.scale"),
        Rule(f"{theirs}.norm_k.weight", f"{ours}.qkv.k_norm.scale"),
    )


def _apart(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tuple(r for x in "qkv" for r in linear(f"{theirs}.to_{x}", f"{ours}.qkv.{x}"))


def _fused(theirs: str, ours: str) -> tuple[Rule, ...]:
    return fused_linear(f"{theirs}.qkv", *(f"{ours}.qkv.{x}" for x in "qkv"))


def _table(name: str, embed: str, block: str, qkv) -> Table:
    streams = (
        rule
        for x in ("img", "txt")
        for part in (_stream, qkv)
        for rule in part(f"{block}.{{layer}}.{x}", f"blocks.{x}")
    )
    return Table(name, (*_ends(embed), *streams))


DIFFUSERS = _table("a mini transformer in diffusers' layout", "embed", "transformer_blocks", _apart)
ORIGINAL = _table("a mini transformer in its authors' layout", "emb", "blocks", _fused)


def config_of(settings) -> MiniConfig:
    return settings.build(
        MiniConfig, {name: settings[name] for name in MiniConfig.__dataclass_fields__}
    )


def settings_of(config: MiniConfig) -> dict:
    return {
        "_class_name": CLASS,
        **{n: getattr(config, n) for n in MiniConfig.__dataclass_fields__},
    }


def inferred(tensors, axes_dim=TINY.axes_dim) -> MiniConfig:
    hidden, features = shape_of(tensors, "x_embedder.weight", 2)
    (head_dim,) = shape_of(tensors, "blocks.0.img.norm_q.weight", 1)
    return MiniConfig(
        patch_size=4,
        latent_channels=features // 16,
        num_heads=hidden // head_dim,
        head_dim=head_dim,
        axes_dim=tuple(axes_dim),
        num_blocks=layers_of(tensors, r"blocks\.(\d+)\..*"),
        mlp_ratio=2.0,
        txt_dim=shape_of(tensors, "context_embedder.weight", 2)[1],
        pooled_dim=shape_of(tensors, "emb.vector_in.linear_1.weight", 2)[1],
    )


def read_text(config: MiniConfig, stored) -> TextReading | None:
    t5s = stored.of_kind(T5Config, "T5", most=1)
    if not t5s:
        return None
    return TextReading(
        tuple(t5s), lambda encoders, pad_id: T5Text(encoders[0], pad_id=pad_id), stored.text_length
    )


@cache
def dialects(config) -> tuple[Dialect, ...]:
    del config
    return (
        Dialect("PEFT", DIFFUSERS, (PREFIX,)),
        Dialect("kohya", underscored(ORIGINAL), KOHYA_PREFIXES),
    )


MINI = Family(
    kind=MINI_KIND,
    title="Mini",
    text_encoders="Mini has T5",
    tiny_autoencoder="none",
    read_text=read_text,
    published={"mini-tiny": Published("mini-tiny", TINY, {})},
    autoencoder=VAEConfig(
        channels=(8, 16),
        layers_per_block=1,
        latent_channels=3,
        groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    ),
    defaults_of=lambda _: CallDefaults(text_length=16, resolution=40, steps=3, guidance=1.0),
    schedule_of=lambda _: FlowSchedule(),
    diffusers=DiffusersLayout(
        class_name=CLASS,
        config_of=config_of,
        settings_of=settings_of,
        table_of=lambda _: DIFFUSERS,
        schedule_of=schedule_of,
    ),
    original=OriginalLayout(
        author="Mini's authors",
        prefixes=("model.", ""),
        recognises=lambda tensors: "emb.time_in.linear_1.weight" in tensors.shapes,
        config_of=inferred,
        table_of=lambda _: ORIGINAL,
        text_encoders={},
        unknown_fields={"axes_dim": "Rotary channels of (index, row, column)."},
        written_prefix="model.",
    ),
    lora=LoRANames(
        targets=(r"blocks\.(img|txt)\.(qkv\.[qkv]|out)",),
        dialects=dialects,
        model_of=lambda _: None,
    ),
    attention_pairs=lambda config, image, text: config.num_blocks * (image + text) ** 2,
    layer_tokens=layer_tokens,
)
