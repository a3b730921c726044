"""Pipelines in folders as diffusers has them, of any family, with small models and tokenizers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from taca_jax.autoencoders import vae_diffusers
from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.families.registry import family_of
from taca_jax.formats.key_table import Table
from taca_jax.formats.tensor_files import write_tensors
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.t5 import T5Config
from tests.models import in_layout

WORDS = ("<pad>", "</s>", "a", "red", "blue", "circle", "square")


def write_folder(root: Path, class_name: str, parts: Mapping[str, tuple[Any, Table]]) -> Path:
    """Writes models, each in the layout of its table, with a tokenizer for each text encoder and an
    index, as a pipeline of the class."""
    for part, (model, table) in parts.items():
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        (root / part).mkdir(parents=True)
        write_tensors(root / part / f"{name}.safetensors", in_layout(table, model))
        (root / part / "config.json").write_text(json.dumps(settings_of(model.config)))
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in parts if "text" in part]
    index = {part: ["library", "Class"] for part in (*parts, *tokenizers)}
    (root / "model_index.json").write_text(json.dumps({"_class_name": class_name, **index}))
    write_tokenizers(root, tokenizers)
    return root


def write_tokenizers(root: Path, names: Sequence[str] = ("tokenizer", "tokenizer_2")) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "</s>"))
    tokenizer.pre_tokenizer = Whitespace()
    for name in names:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
        )
        fast.save_pretrained(str(root / name))


def settings_of(config: Any) -> dict[str, Any]:
    """The config.json of diffusers or transformers for a model's config."""
    match config:
        case VAEConfig():
            return vae_diffusers.settings_of(config)
        case CLIPConfig():
            return {
                "model_type": "clip_text_model",
                "vocab_size": config.vocab_size,
                "max_position_embeddings": config.max_tokens,
                "hidden_size": config.dim,
                "intermediate_size": config.ff_dim,
                "num_attention_heads": config.num_heads,
                "num_hidden_layers": config.num_layers,
                "hidden_act": config.activation,
                "eos_token_id": 2,  # as in the released configs
            }
        case T5Config():
            return {
                "model_type": "t5",
                "feed_forward_proj": "gated-gelu",
                "vocab_size": config.vocab_size,
                "d_model": config.dim,
                "d_ff": config.ff_dim,
                "num_heads": config.num_heads,
                "d_kv": config.head_dim,
                "num_layers": config.num_layers,
                "relative_attention_num_buckets": config.relative_buckets,
                "relative_attention_max_distance": config.relative_max_distance,
            }
        case _:
            return family_of(config).diffusers.settings_of(config)
