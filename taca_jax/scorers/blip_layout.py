"""BLIP for questions as transformers stores it, and as its authors do.

The authors' file (`model_base_vqa_capfilt_large.pth`) is for 480 pixels; transformers' copies of it
have positions interpolated to 384. T2I-CompBench scores with 480.
"""

from typing import Any

from taca_jax.errors import UserError
from taca_jax.formats.key_table import Rule, Table, convolution, fused_linear, linear, norm
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import Tensors, layers_of, shape_of
from taca_jax.scorers.blip import BLIP_VQA, NORM_EPSILON, BLIPConfig
from taca_jax.scorers.vit import ViTConfig
from taca_jax.scorers.vit_layout import (
    DROP_AXIS,
    TRANSFORMERS_LAYER,
    norms_and_feed_forward,
    part_of,
    vit_config,
)

MODEL_TYPE = "blip"
"""In transformers' config.json."""

_HEAD_DIM = 64
"""Of the authors' models, whose files do not say it."""


def _text(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The rules of one of the two BERTs, which are the same in both layouts."""
    layer, blocks = f"{theirs}.encoder.layer.{{layer}}", f"{ours}.blocks"
    rules = [
        Rule(f"{theirs}.embeddings.word_embeddings.weight", f"{ours}.token_embed.embedding"),
        Rule(f"{theirs}.embeddings.position_embeddings.weight", f"{ours}.position_embed.embedding"),
        *norm(f"{theirs}.embeddings.LayerNorm", f"{ours}.embed_norm"),
    ]
    for their_part, our_part in {"attention": "attn", "crossattention": "cross"}.items():
        for name in ("query", "key", "value"):
            path = f"{blocks}.{our_part}.{name[0]}"
            rules += linear(f"{layer}.{their_part}.self.{name}", path)
        rules += linear(f"{layer}.{their_part}.output.dense", f"{blocks}.{our_part}.o")
        rules += norm(f"{layer}.{their_part}.output.LayerNorm", f"{blocks}.{our_part}_norm")
    return (
        *rules,
        *linear(f"{layer}.intermediate.dense", f"{blocks}.ff.wi"),
        *linear(f"{layer}.output.dense", f"{blocks}.ff.wo"),
        *norm(f"{layer}.output.LayerNorm", f"{blocks}.ff_norm"),
    )


_HEAD = "text_decoder.cls.predictions"
_TEXTS = (
    *_text("text_encoder", "question"),
    *_text("text_decoder.bert", "answer"),
    *linear(f"{_HEAD}.transform.dense", "head.dense"),
    *norm(f"{_HEAD}.transform.LayerNorm", "head.norm"),
    Rule(f"{_HEAD}.bias", "head.bias"),
)
_IGNORED = (
    r"text_decoder\.cls\.predictions\.decoder\.(weight|bias)",  # copies of embeddings and bias
    r"(text_encoder|text_decoder\.bert)\.embeddings\.position_ids",  # 0, 1, 2, ...
)


def _image(
    embeddings: tuple[str, str, str],
    layer: str,
    attention: tuple[str, str],
    norms: tuple[str, str],
    final_norm: str,
) -> tuple[Rule, ...]:
    """The rules of the vision transformer. embeddings: of the class, positions and patches;
    attention: the fused projection to queries, keys and values, and that of the output."""
    whole, positions, patches = embeddings
    inputs, output = (f"{layer}.{name}" for name in attention)
    return (
        Rule(whole, "image.class_embed.embedding", DROP_AXIS),
        Rule(positions, "image.position_embed.embedding", DROP_AXIS),
        *convolution(patches, "image.patch_embed"),
        *fused_linear(inputs, *(f"image.blocks.attn.{name}" for name in "qkv")),
        *linear(output, "image.blocks.attn.o"),
        *norms_and_feed_forward(layer, norms, final_norm),
    )


_EMBEDDINGS = "vision_model.embeddings"

TABLE = Table(
    "a BLIP for questions in transformers' layout",
    (
        *_image(
            (
                f"{_EMBEDDINGS}.class_embedding",
                f"{_EMBEDDINGS}.position_embedding",
                f"{_EMBEDDINGS}.patch_embedding",
            ),
            TRANSFORMERS_LAYER,
            ("self_attn.qkv", "self_attn.projection"),
            ("layer_norm1", "layer_norm2"),
            "vision_model.post_layernorm",
        ),
        *_TEXTS,
    ),
    _IGNORED,
)

ORIGINAL_TABLE = Table(
    "a BLIP for questions in its authors' layout",
    (
        *_image(
            (
                "visual_encoder.cls_token",
                "visual_encoder.pos_embed",
                "visual_encoder.patch_embed.proj",
            ),
            "visual_encoder.blocks.{layer}",
            ("attn.qkv", "attn.proj"),
            ("norm1", "norm2"),
            "visual_encoder.norm",
        ),
        *_TEXTS,
    ),
    _IGNORED,
)

# transformers' own. They differ from the published model in the heads of the text, which its
# config.json therefore states, and in image_size and layer_norm_eps, which it does not.
_TEXT_DEFAULTS = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 30522,
}
_IMAGE_DEFAULTS = {
    "image_size": 384,
    "patch_size": 16,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}


def config_of(settings: Settings) -> BLIPConfig:
    """The config that transformers' config.json describes. Raises UserError for other models."""
    settings.expect("model_type", MODEL_TYPE)
    text = part_of(settings, "text_config", _TEXT_DEFAULTS)
    text.expect("hidden_act", "gelu")
    text.expect("layer_norm_eps", NORM_EPSILON)
    image = vit_config(part_of(settings, "vision_config", _IMAGE_DEFAULTS), pre_norm=False)
    for name in ("hidden_size", "encoder_hidden_size"):
        text.expect(name, image.dim)
    start = text.integer("bos_token_id")
    values: dict[str, Any] = {
        "vocab_size": text["vocab_size"],
        "max_tokens": text["max_position_embeddings"],
        "ff_dim": text["intermediate_size"],
        "num_heads": text["num_attention_heads"],
        "num_layers": text["num_hidden_layers"],
    }
    return BLIPConfig(image=image, **values, answer_token=start, question_token=start + 1)


def is_original(tensors: Tensors) -> bool:
    """Whether these are tensors of a BLIP for questions in its authors' layout."""
    return {"visual_encoder.cls_token", f"{_HEAD}.bias"} <= tensors.shapes.keys()


def inferred(tensors: Tensors) -> BLIPConfig:
    """The config of tensors in the authors' layout, from their shapes; heads have 64 channels, and
    what shapes do not show is that of the published model."""
    image = "visual_encoder"
    dim, _, patch_size, _ = shape_of(tensors, f"{image}.patch_embed.proj.weight", 4)
    _, positions, _ = shape_of(tensors, f"{image}.pos_embed", 3)
    side = round((positions - 1) ** 0.5)
    if side**2 != positions - 1:
        raise UserError(f"{tensors.where} has {positions - 1} positions; expected a square number")
    image_ff, _ = shape_of(tensors, f"{image}.blocks.0.mlp.fc1.weight", 2)
    vocab_size, _ = shape_of(tensors, "text_encoder.embeddings.word_embeddings.weight", 2)
    max_tokens, _ = shape_of(tensors, "text_encoder.embeddings.position_embeddings.weight", 2)
    text_ff, _ = shape_of(tensors, "text_encoder.encoder.layer.0.intermediate.dense.weight", 2)
    return BLIPConfig(
        image=ViTConfig(
            image_size=side * patch_size,
            patch_size=patch_size,
            dim=dim,
            ff_dim=image_ff,
            num_heads=dim // _HEAD_DIM,
            num_layers=layers_of(tensors, rf"{image}\.blocks\.(\d+)\..*"),
            activation=BLIP_VQA.image.activation,
            norm_epsilon=BLIP_VQA.image.norm_epsilon,
            pre_norm=False,
        ),
        vocab_size=vocab_size,
        max_tokens=max_tokens,
        ff_dim=text_ff,
        num_heads=dim // _HEAD_DIM,
        num_layers=layers_of(tensors, r"text_encoder\.encoder\.layer\.(\d+)\..*"),
        answer_token=vocab_size - 2,
        question_token=vocab_size - 1,
    )
