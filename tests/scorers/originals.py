"""transformers' CLIP and BLIP, small and random in every parameter, and tokenizers for them."""

import json
import string
from pathlib import Path

import pytest

WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "the", "?"),
    *("red", "green", "bench", "car", *string.ascii_lowercase[1:]),
)
"""Of a small BERT; its vocabulary ends with [DEC] and [ENC], which its tokenizer lacks."""

IMAGE = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "image_size": 24,
    "patch_size": 8,
}
CLIP_TEXT = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 12,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
BLIP_TEXT = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 24,
    "encoder_hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 40,
    "bos_token_id": len(WORDS),
}


def perturbed(model):
    """The model with random numbers of a size that matters in every parameter."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=generator))
    return model.eval()


def clip(text=CLIP_TEXT, image=IMAGE, projection_dim=10):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.CLIPConfig(
        text_config=text, vision_config=image, projection_dim=projection_dim
    )
    return perturbed(transformers.CLIPModel(settings))


def blip(text=BLIP_TEXT, image=IMAGE):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = transformers.BlipConfig(text_config=text, vision_config=image)
    return perturbed(transformers.BlipForQuestionAnswering(settings))


def bert_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer of `WORDS`, as BERT's folders have it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
