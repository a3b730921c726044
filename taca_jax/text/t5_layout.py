"""T5 v1.1 encoders as transformers stores them (`T5EncoderModel`)."""

from taca_jax.errors import UserError
from taca_jax.formats.key_table import TRANSPOSE, Rule, Table
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of
from taca_jax.text.t5 import T5Config

_LAYER = "encoder.block.{layer}.layer"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

TABLE = Table(
    "a T5 v1.1 encoder in transformers' layout",
    (
        Rule("shared.weight", "token_embed.embedding"),
        Rule(_BIAS, "relative_bias.embedding"),
        Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
        Rule(f"{_LAYER}.0.layer_norm.weight", "blocks.attn_norm.scale"),
        *(
            Rule(f"{_LAYER}.0.SelfAttention.{x}.weight", f"blocks.attn.{x}.kernel", TRANSPOSE)
            for x in "qkvo"
        ),
        Rule(f"{_LAYER}.1.layer_norm.weight", "blocks.ff_norm.scale"),
        Rule(f"{_LAYER}.1.DenseReluDense.wi_0.weight", "blocks.ff.wi_gate.kernel", TRANSPOSE),
        Rule(f"{_LAYER}.1.DenseReluDense.wi_1.weight", "blocks.ff.wi_value.kernel", TRANSPOSE),
        Rule(f"{_LAYER}.1.DenseReluDense.wo.weight", "blocks.ff.wo.kernel", TRANSPOSE),
    ),
    ignored=(r"encoder\.embed_tokens\.weight",),  # shared.weight again
)


def is_t5(tensors: Tensors) -> bool:
    return "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors.shapes


def config_of(settings: Settings) -> T5Config:
    """The config that transformers' config.json describes.

    Raises UserError for T5 1.0, whose feed-forward layers differ, and for other models.
    """
    settings.expect("model_type", "t5")
    settings.expect("feed_forward_proj", "gated-gelu")
    values = {
        "vocab_size": settings["vocab_size"],
        "dim": settings["d_model"],
        "ff_dim": settings["d_ff"],
        "num_heads": settings["num_heads"],
        "head_dim": settings["d_kv"],
        "num_layers": settings["num_layers"],
        "relative_buckets": settings.get("relative_attention_num_buckets", 32),
        "relative_max_distance": settings.get("relative_attention_max_distance", 128),
    }
    return settings.build(T5Config, values)


def inferred(tensors: Tensors) -> T5Config:
    """The config, inferred from the shapes, for weights without a config.json.

    Shapes do not show relative_max_distance, which is 128 in every T5 v1.1.
    Raises UserError for T5 1.0 and for other models.
    """
    first = "encoder.block.0.layer"
    vocab_size, dim = shape_of(tensors, "shared.weight", 2)
    relative_buckets, num_heads = shape_of(tensors, _BIAS, 2)
    inner, _ = shape_of(tensors, f"{first}.0.SelfAttention.q.weight", 2)
    ff_dim, _ = shape_of(tensors, f"{first}.1.DenseReluDense.wi_0.weight", 2)
    if not num_heads or inner % num_heads:
        raise UserError(
            f"{tensors.where} has {num_heads} heads over {inner} channels, which they must divide"
        )
    return T5Config(
        vocab_size=vocab_size,
        dim=dim,
        ff_dim=ff_dim,
        num_heads=num_heads,
        head_dim=inner // num_heads,
        num_layers=layers_of(tensors, r"encoder\.block\.(\d+)\..*"),
        relative_buckets=relative_buckets,
    )
