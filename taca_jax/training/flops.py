"""The arithmetic of a model and of a training step, counted from the model's shape."""

import functools
import math
import re

import jax.numpy as jnp

from taca_jax.families.flux.model import FluxConfig
from taca_jax.families.sd3.model import SD3Config
from taca_jax.nn.lora import linears
from taca_jax.text.clip import CLIP_L
from taca_jax.training.config import TrainConfig
from taca_jax.weights.folders import abstract_model


def text_tokens(config: FluxConfig | SD3Config, t5_tokens: int) -> int:
    """How many text tokens a model reads: T5's, before which Stable Diffusion 3 has CLIP's."""
    return t5_tokens + (CLIP_L.max_tokens if isinstance(config, SD3Config) else 0)


@functools.cache
def forward_flops(config: FluxConfig | SD3Config, *, image: int, text: int) -> float:
    """FLOPs of the transformer's forward pass on one sample of `image` and `text` tokens.

    A multiply-add is two. Products alone: linear layers, and queries with keys and with values;
    what is done to each element beside them is below a hundredth at the models' real widths.
    """
    transformer = abstract_model(config, dtype=jnp.float32)
    linear = sum(
        2 * math.prod(layer.kernel.shape) * _tokens(path, image, text)
        for path, layer in linears(transformer)
    )
    if isinstance(config, FluxConfig):
        pairs = (config.num_double_blocks + config.num_single_blocks) * (image + text) ** 2
    else:
        pairs = config.num_layers * (image + text) ** 2 + config.num_dual_layers * image**2
    return linear + 4 * config.hidden * pairs


def step_flops(
    config: TrainConfig, transformer: FluxConfig | SD3Config, *, image: int, text: int
) -> float:
    """FLOPs of the transformer in one optimizer step, over all devices.

    Forward, the gradient of activations, and with everything trained that of weights, each as much
    as the forward pass; what rematerialisation computes again is not counted, nor are LoRA factors.
    """
    times = 2 if config.lora is not None else 3
    samples = config.data.batch_size * config.grad_accumulation
    return forward_flops(transformer, image=image, text=text) * times * samples


def _tokens(path: str, image: int, text: int) -> int:
    """On how many tokens of a sample a layer acts."""
    if re.search(r"(mod|_in\.linear_[12])$", path):
        return 1
    if path.startswith("single_blocks"):
        return image + text
    if ".txt." in path or path == "txt_in":
        return text
    return image
