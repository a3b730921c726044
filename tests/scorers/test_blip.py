"""BLIP for questions against transformers, through the converter, in both layouts."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from taca_jax.convert.cli import main
from taca_jax.nn.kinds import abstract_model, flat_params
from taca_jax.scorers import blip_layout
from taca_jax.scorers.blip import BLIP_VQA, BLIPVQA
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.compare import relative_error
from tests.models import layout_shapes, shapes_alone
from tests.scorers import originals


@nnx.jit
def run(model: BLIPVQA, pixels, tokens, mask):
    image = model.image(pixels)
    return image, model.first_word(image, tokens, mask)


def expected(theirs, pixels, tokens, mask):
    """transformers' embeddings of the pictures, and logits of the answers' first words.

    Each question alone and without padding: transformers 5.24 drops the mask of cross-attention,
    so that its answers attend to padding. The authors' code masks it.
    """
    import torch

    images, logits = [], []
    with torch.no_grad():
        for picture, question, counts in zip(pixels, tokens, mask, strict=True):
            nchw = torch.as_tensor(picture.transpose(2, 0, 1))[None]
            image = theirs.vision_model(nchw).last_hidden_state
            ids = torch.as_tensor(question[counts])[None]
            read = theirs.text_encoder(input_ids=ids, encoder_hidden_states=image)[0]
            start = torch.full((1, 1), theirs.config.text_config.bos_token_id)
            written = theirs.text_decoder(input_ids=start, encoder_hidden_states=read)
            images.append(image[0])
            logits.append(written.logits[0, 0])
    return torch.stack(images), torch.stack(logits)


def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
    tokens = rng.integers(5, len(originals.WORDS), (3, 7))
    mask = np.arange(7) < np.array([[7], [4], [5]])
    return pixels, tokens, mask


def test_matches_transformers_through_the_converter(tmp_path, capsys):
    theirs = originals.blip()
    theirs.save_pretrained(tmp_path / "src")
    originals.bert_tokenizer(tmp_path / "src")
    where = ["--src", str(tmp_path / "src"), "--dst", str(tmp_path / "dst")]
    main(["blip_vqa", *where])
    main(["verify", *where])
    main(["inspect", str(tmp_path / "src")])
    said = capsys.readouterr().out
    assert "0 rounded" in said
    assert "a BLIP for questions in transformers' layout" in said
    assert (tmp_path / "dst" / "tokenizer" / "vocab.txt").is_file()

    ours = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    pixels, tokens, mask = inputs()
    image, logits = run(ours, *map(jnp.asarray, (pixels, tokens, mask)))
    their_image, their_logits = expected(theirs, pixels, tokens, mask)
    assert relative_error(image, their_image) <= 1e-5
    assert relative_error(logits, their_logits) <= 1e-5
    # What is masked has no effect, and what is not has one.
    changed = np.where(mask, tokens, 6)
    np.testing.assert_array_equal(run(ours, pixels, changed, mask)[1], logits)
    assert relative_error(run(ours, pixels, changed, np.ones_like(mask))[1][1:], logits[1:]) > 1e-3


_NAMES = {
    r"vision_model\.embeddings\.class_embedding": "visual_encoder.cls_token",
    r"vision_model\.embeddings\.position_embedding": "visual_encoder.pos_embed",
    r"vision_model\.embeddings\.patch_embedding": "visual_encoder.patch_embed.proj",
    r"vision_model\.encoder\.layers": "visual_encoder.blocks",
    r"vision_model\.post_layernorm": "visual_encoder.norm",
    r"self_attn\.qkv": "attn.qkv",
    r"self_attn\.projection": "attn.proj",
    r"layer_norm(\d)": r"norm\1",
}
"""From transformers' names to the authors', as transformers' own conversion has them reversed."""


def renamed(name: str) -> str:
    if name.startswith("vision_model"):
        for theirs, original in _NAMES.items():
            name = re.sub(theirs, original, name)
    return name


def test_the_authors_layout_is_the_same_model(tmp_path, capsys):
    """Of 64 channels a head, which their file does not say."""
    image = originals.IMAGE | {"hidden_size": 128, "num_attention_heads": 2}
    text = originals.BLIP_TEXT | {
        "hidden_size": 128,
        "encoder_hidden_size": 128,
    }
    theirs = originals.blip(text, image | {"layer_norm_eps": 1e-6})
    theirs.save_pretrained(tmp_path / "src")
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    copies = {
        "text_decoder.cls.predictions.decoder.bias": tensors["text_decoder.cls.predictions.bias"],
        "text_encoder.embeddings.position_ids": np.arange(40)[None],
    }
    file = tmp_path / "blip.safetensors"
    save_file({renamed(name): x for name, x in (tensors | copies).items()}, file)

    for name, src in {"theirs": tmp_path / "src", "authors": file}.items():
        main(["blip_vqa", "--src", str(src), "--dst", str(tmp_path / name)])
    main(["verify", "--src", str(file), "--dst", str(tmp_path / "authors")])
    main(["inspect", str(file)])
    assert "a BLIP for questions in its authors' layout" in capsys.readouterr().out
    one, other = (
        load_model(tmp_path / name, LoadOptions(dtype=jnp.float32))
        for name in ("theirs", "authors")
    )
    assert one.config == other.config
    assert one.config.question_token == len(originals.WORDS) + 1
    for path, param in flat_params(one).items():
        np.testing.assert_array_equal(param.get_value(), flat_params(other)[path].get_value(), path)


def test_the_authors_released_size_is_known():
    shapes = layout_shapes(blip_layout.ORIGINAL_TABLE, BLIP_VQA)
    assert blip_layout.is_original(shapes_alone(shapes))
    assert blip_layout.inferred(shapes_alone(shapes)) == BLIP_VQA


def test_full_size_has_exactly_the_parameters_of_the_original():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        settings = transformers.BlipConfig(
            text_config={"num_attention_heads": 12}, vision_config={"image_size": 480}
        )
        theirs = transformers.BlipForQuestionAnswering(settings)
    given = {
        name: tuple(tensor.shape)
        for name, tensor in theirs.state_dict().items()
        if "predictions.decoder" not in name
    }
    assert layout_shapes(blip_layout.TABLE, BLIP_VQA) == given
    params = flat_params(abstract_model(BLIP_VQA, dtype=jnp.float32))
    count = sum(int(np.prod(param.shape)) for param in params.values())
    assert count == sum(param.numel() for param in theirs.parameters())
