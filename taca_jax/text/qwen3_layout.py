"""Qwen3 as transformers stores it (`Qwen3ForCausalLM`), which ComfyUI's single files are in too."""

from taca_jax.errors import UserError
from taca_jax.formats.key_table import TRANSPOSE, Rule, Table
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of
from taca_jax.text.qwen3 import READS, Qwen3Config

MODEL_TYPE = "qwen3"
NAME = "a Qwen3 in transformers' layout"

_LAYER = "model.layers.{layer}"
_FIRST = "model.layers.0"
_KERNELS = {
    **{f"self_attn.{x}_proj": f"attn.{x}" for x in "qkvo"},
    **{f"mlp.{name}_proj": name for name in ("gate", "up", "down")},
}
_NORMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "post_attention_layernorm": "mlp_norm",
}


def table_of(config: Qwen3Config) -> Table:
    """The key table of an encoder of this config; layers behind its last one are not needed."""
    kept = "|".join(map(str, range(config.num_layers)))
    return Table(
        NAME,
        (
            Rule("model.embed_tokens.weight", "token_embed.embedding"),
            *(
                Rule(f"{_LAYER}.{theirs}.weight", f"blocks.{ours}.kernel", TRANSPOSE)
                for theirs, ours in _KERNELS.items()
            ),
            *(
                Rule(f"{_LAYER}.{theirs}.weight", f"blocks.{ours}.scale")
                for theirs, ours in _NORMS.items()
            ),
        ),
        ignored=(
            rf"model\.layers\.(?!({kept})\.)\d+\..*",
            r"model\.norm\.weight",
            r"lm_head\.weight",
        ),
    )


def is_qwen3(tensors: Tensors) -> bool:
    return {
        f"{_FIRST}.self_attn.q_norm.weight",
        f"{_FIRST}.mlp.gate_proj.weight",
    } <= tensors.shapes.keys()


def config_of(settings: Settings) -> Qwen3Config:
    """The config that transformers' config.json describes, with the layers that FLUX.2 reads.

    Raises UserError for other models, for too few layers, and for options that Qwen3 does not use.
    """
    settings.expect("model_type", MODEL_TYPE)
    settings.expect("hidden_act", "silu")
    settings.expect("attention_bias", False)
    settings.expect("use_sliding_window", False)
    settings.expect("rope_scaling")
    _check_layers(settings.integer("num_hidden_layers"), str(settings.where))
    values = {
        "vocab_size": settings["vocab_size"],
        "dim": settings["hidden_size"],
        "ff_dim": settings["intermediate_size"],
        "num_heads": settings["num_attention_heads"],
        "num_kv_heads": settings["num_key_value_heads"],
        "head_dim": settings["head_dim"],
        "num_layers": READS[-1],
        "reads": READS,
        "theta": _theta(settings),
        "norm_epsilon": settings["rms_norm_eps"],
    }
    return settings.build(Qwen3Config, values)


def _theta(settings: Settings) -> float:
    """transformers 5 keeps it among `rope_parameters`."""
    inside = settings.get("rope_parameters", {})
    return settings["rope_theta"] if "rope_theta" not in inside else inside["rope_theta"]


def inferred(tensors: Tensors) -> Qwen3Config:
    """The config, inferred from the shapes, for weights without a config.json.

    Shapes do not show theta and the norms' epsilon, which are the same in every Qwen3. Raises
    UserError for other models, and for too few layers.
    """
    vocab_size, dim = shape_of(tensors, "model.embed_tokens.weight", 2)
    (head_dim,) = shape_of(tensors, f"{_FIRST}.self_attn.q_norm.weight", 1)
    queries, _ = shape_of(tensors, f"{_FIRST}.self_attn.q_proj.weight", 2)
    keys, _ = shape_of(tensors, f"{_FIRST}.self_attn.k_proj.weight", 2)
    ff_dim, _ = shape_of(tensors, f"{_FIRST}.mlp.gate_proj.weight", 2)
    if not head_dim or queries % head_dim or keys % head_dim:
        raise UserError(
            f"{tensors.where} has heads of {head_dim} over {queries} and {keys} channels, which "
            "they must divide"
        )
    _check_layers(layers_of(tensors, r"model\.layers\.(\d+)\..*"), tensors.where)
    return Qwen3Config(
        vocab_size=vocab_size,
        dim=dim,
        ff_dim=ff_dim,
        num_heads=queries // head_dim,
        num_kv_heads=keys // head_dim,
        head_dim=head_dim,
        num_layers=READS[-1],
        reads=READS,
    )


def _check_layers(count: int, where: str) -> None:
    if count < READS[-1]:
        raise UserError(
            f"{where} is a Qwen3 of {count} layers; those up to {READS[-1]} are read, which 4B and "
            "8B have"
        )
