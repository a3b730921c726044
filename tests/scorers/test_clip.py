"""CLIPScore's model against transformers, through the converter."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.convert.cli import main
from taca_jax.nn.kinds import abstract_model, flat_params
from taca_jax.scorers import clip_layout
from taca_jax.scorers.clip import CLIP_VIT_B_32, CLIPScore
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.compare import relative_error
from tests.models import layout_shapes
from tests.scorers import originals


@nnx.jit
def run(model: CLIPScore, pixels, tokens):
    return model(pixels, tokens), model.image(pixels)


def test_matches_transformers_through_the_converter(tmp_path, capsys):
    theirs = originals.clip()
    import torch

    theirs.save_pretrained(tmp_path / "src")
    main(["clip_score", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "dst")])
    main(["verify", "--src", str(tmp_path / "src"), "--dst", str(tmp_path / "dst")])
    main(["inspect", str(tmp_path / "src")])
    said = capsys.readouterr().out
    assert "to read text, copy the files of its tokenizer" in said
    assert "0 rounded" in said
    assert "a CLIP with both towers in transformers' layout" in said

    ours = load_model(tmp_path / "dst", LoadOptions(dtype=jnp.float32))
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 24, 24, 3)).astype(np.float32)
    tokens = rng.integers(3, 96, (3, 12))
    tokens[:, 8] = 96
    with torch.no_grad():
        nchw = torch.as_tensor(pixels.transpose(0, 3, 1, 2))
        out = theirs(input_ids=torch.as_tensor(tokens), pixel_values=nchw)
        cosines = (out.image_embeds * out.text_embeds).sum(-1)
        hidden = theirs.vision_model(nchw).pooler_output
    got, image = run(ours, jnp.asarray(pixels), jnp.asarray(tokens))
    assert relative_error(image[:, 0], hidden) <= 1e-5
    assert relative_error(got, cosines) <= 1e-5
    assert np.abs(np.diff(got)).max() > 1e-2


def test_full_size_has_exactly_the_parameters_of_the_original():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig())
    given = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    del given["logit_scale"]
    assert layout_shapes(clip_layout.TABLE, CLIP_VIT_B_32) == given
    params = flat_params(abstract_model(CLIP_VIT_B_32, dtype=jnp.float32))
    assert sum(int(np.prod(param.shape)) for param in params.values()) == 151_277_312
