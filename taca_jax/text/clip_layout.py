"""CLIP text encoders as stored by transformers, and in the single files that ComfyUI reads."""

import re

from taca_jax.errors import UserError
from taca_jax.formats.key_table import KEEP, TRANSPOSE, Rule, Table, linear, norm
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of
from taca_jax.text.clip import CLIP_BIGG, CLIP_L, NORM_EPSILON, Activation, CLIPConfig

PREFIX = "text_model."
"""Prefix of all names except the projection's; transformers 5 omits it in models without one."""
PROJECTION, OPENCLIP_PROJECTION = "text_projection.weight", "text_projection"
"""A PyTorch Linear `[out, in]`; OpenCLIP's is a bare parameter `[in, out]`."""

_KNOWN = {(known.dim, known.num_layers): known for known in (CLIP_L, CLIP_BIGG)}


def _table(prefix: str, projection: Rule) -> Table:
    layer = f"{prefix}encoder.layers.{{layer}}"
    attention = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    embeddings = f"{prefix}embeddings"
    return Table(
        "a CLIP text encoder in transformers' layout",
        (
            Rule(f"{embeddings}.token_embedding.weight", "token_embed.embedding"),
            Rule(f"{embeddings}.position_embedding.weight", "position_embed.embedding"),
            *norm(f"{layer}.layer_norm1", "blocks.attn_norm"),
            *(
                rule
                for ours, theirs in attention.items()
                for rule in linear(f"{layer}.self_attn.{theirs}", f"blocks.attn.{ours}")
            ),
            *norm(f"{layer}.layer_norm2", "blocks.ff_norm"),
            *linear(f"{layer}.mlp.fc1", "blocks.ff.wi"),
            *linear(f"{layer}.mlp.fc2", "blocks.ff.wo"),
            *norm(f"{prefix}final_layer_norm", "final_norm"),
            projection,
        ),
        ignored=(
            rf"{re.escape(embeddings)}\.position_ids",  # 0, 1, 2, ...
            "logit_scale",  # of the contrastive loss
        ),
    )


_LINEAR = Rule(PROJECTION, "projection.kernel", TRANSPOSE)
_BARE = Rule(OPENCLIP_PROJECTION, "projection.kernel", KEEP)

TABLE = _table(PREFIX, _LINEAR)
"""The layout of `CLIPTextModelWithProjection`, and of every released file."""


def table_of(tensors: Tensors) -> Table:
    """The key table of the layout that these tensors are in."""
    projection = _BARE if OPENCLIP_PROJECTION in tensors.shapes else _LINEAR
    return _table(_prefix(tensors), projection)


def is_clip(tensors: Tensors) -> bool:
    return f"{_prefix(tensors)}embeddings.token_embedding.weight" in tensors.shapes


def is_known(tensors: Tensors) -> bool:
    """Whether it is a CLIP whose config its shapes determine."""
    return is_clip(tensors) and _size(tensors) in _KNOWN


def config_of(settings: Settings, tensors: Tensors) -> CLIPConfig:
    """The config that transformers' config.json describes; the tensors show the projection.

    Raises UserError for other models, including a whole CLIP with its image encoder.
    """
    settings.expect("model_type", "clip_text_model")
    settings.expect("layer_norm_eps", NORM_EPSILON)
    settings.expect("hidden_act", "quick_gelu", "gelu")
    end_token = settings.get("eos_token_id", CLIP_L.vocab_size - 1)
    values = {
        "vocab_size": settings.get("vocab_size", CLIP_L.vocab_size),
        "max_tokens": settings.get("max_position_embeddings", CLIP_L.max_tokens),
        "dim": settings["hidden_size"],
        "ff_dim": settings["intermediate_size"],
        "num_heads": settings["num_attention_heads"],
        "num_layers": settings["num_hidden_layers"],
        "activation": settings.get("hidden_act", "quick_gelu"),
        "projection_dim": _projection_dim(tensors),
        # Configs from before transformers 4.31 say 2, which occurs in no prompt; there the highest
        # id is pooled.
        "end_token": None if end_token == 2 else end_token,
    }
    return settings.build(CLIPConfig, values)


def inferred(
    tensors: Tensors, *, num_heads: int | None = None, activation: Activation | None = None
) -> CLIPConfig:
    """The config, inferred from the shapes, for weights without a config.json.

    Shapes do not show heads and activation: they are known for CLIP-L and CLIP-bigG, and must be
    given for other sizes. Raises UserError if they are not.
    """
    prefix = _prefix(tensors)
    vocab_size, dim = shape_of(tensors, f"{prefix}embeddings.token_embedding.weight", 2)
    max_tokens, _ = shape_of(tensors, f"{prefix}embeddings.position_embedding.weight", 2)
    ff_dim, _ = shape_of(tensors, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)
    _, num_layers = _size(tensors)
    known = _KNOWN.get((dim, num_layers))
    if known is not None:
        num_heads = known.num_heads if num_heads is None else num_heads
        activation = known.activation if activation is None else activation
    if num_heads is None or activation is None:
        raise UserError(
            f"{tensors.where} has a CLIP {dim} wide with {num_layers} layers, neither CLIP-L nor "
            "CLIP-bigG; give --num-heads and --activation to `taca-convert clip`, which reads "
            "it from a file of its own, without a prefix"
        )
    return CLIPConfig(
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        dim=dim,
        ff_dim=ff_dim,
        num_heads=num_heads,
        num_layers=num_layers,
        activation=activation,
        projection_dim=_projection_dim(tensors),
        end_token=None,
    )


def _size(tensors: Tensors) -> tuple[int, int]:
    """Width and number of layers."""
    prefix = _prefix(tensors)
    _, dim = shape_of(tensors, f"{prefix}embeddings.token_embedding.weight", 2)
    return dim, layers_of(tensors, rf"{re.escape(prefix)}encoder\.layers\.(\d+)\..*")


def _prefix(tensors: Tensors) -> str:
    return PREFIX if any(name.startswith(PREFIX) for name in tensors.shapes) else ""


def _projection_dim(tensors: Tensors) -> int | None:
    if OPENCLIP_PROJECTION in tensors.shapes:
        return shape_of(tensors, OPENCLIP_PROJECTION, 2)[1]
    return shape_of(tensors, PROJECTION, 2)[0] if PROJECTION in tensors.shapes else None
