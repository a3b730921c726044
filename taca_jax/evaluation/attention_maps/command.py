"""`python -m taca_jax.evaluation attention`: what TACA does to attention during sampling."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from taca_jax.data.shapes.captions import parse_caption
from taca_jax.errors import UserError
from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.attention_maps.measuring import (
    Batch,
    Measured,
    measure,
    read_batches,
)
from taca_jax.evaluation.attention_maps.shares import shares_of_step
from taca_jax.evaluation.plots import need_matplotlib
from taca_jax.evaluation.record import check_record, model_files, write_record
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.checks import check_evaluation
from taca_jax.pipelines.config import Variant
from taca_jax.pipelines.generate import load_pipeline, local_mesh
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.progress import step_bar
from taca_jax.sampling.loop import make_plan
from taca_jax.taca import describe_gamma
from taca_jax.text.tokenizers import WordTokenizer
from taca_jax.text.words import words_of

_NUMBERS, _ARRAYS = "attention.json", "arrays"
"""What lies in an analysis' folder beside its figures and its record: the means, and a file of all
arrays for each variant, with which an interrupted analysis goes on."""


def run(config: AttentionConfig) -> dict[str, Measured]:
    """Measures plain attention and each gamma, and writes figures and numbers to `config.out`.

    Returns what was measured, by the name of the variant, plain attention first. Raises UserError
    for problems that the user can fix.
    """
    need_matplotlib()
    from taca_jax.evaluation.attention_maps import figures

    assert config.taca is not None  # its class checks that
    out, files = Path(config.out), model_files(config)
    check_evaluation(config, config.prompts)
    check_record(out, config, files, free={"stages"})
    pipeline = load_pipeline(config, local_mesh(config), stages=config.stages)
    words = words_of(config.prompts[0]) if config.word is None else [config.word]
    batches = read_batches(pipeline, config, words)
    _check(pipeline, config, batches[0])
    write_record(out, config, files)
    timesteps = pipeline.timesteps(config.height, config.width, config.steps)
    are_shapes = _are_shapes(pipeline, config.prompts)
    found = {}
    for variant in variants(config):
        path = out / _ARRAYS / f"{variant.name.replace(' ', '-')}.npz"
        if path.exists():
            found[variant.name] = Measured.load(path)
        else:
            with step_bar(len(batches) * len(timesteps), None) as advance:
                found[variant.name] = measure(
                    *(pipeline, config, variant, batches),
                    are_shapes=are_shapes,
                    advance=advance or (lambda: None),
                )
            found[variant.name].save(path)
        print(_summary(variant.name, found))
    with whole_file(out / _NUMBERS) as file:
        file.write_text(json.dumps(_numbers(found, config, words, timesteps), indent=1) + "\n")
    for path in figures.draw(found, _compared(config), words, timesteps, out):
        print(f"wrote {path}")
    if not are_shapes:
        print("no alignment.png: what pictures show can be read only of a model of shapes")
    return found


def variants(config: AttentionConfig) -> list[Variant]:
    """Plain attention, each other gamma without the LoRA, gamma by knots if `taca` has them and, if
    there is a LoRA, TACA with it."""
    assert config.taca is not None
    gammas = [gamma for gamma in dict.fromkeys(config.gammas) if gamma != 1.0]
    # Knots would stand in place of gamma.
    ways = [replace(config.taca, gamma=gamma, knots=None) for gamma in gammas]
    if config.taca.knots is not None:
        ways.append(config.taca)
    found = [Variant("plain", None, 0.0)]
    found += [Variant(describe_gamma(taca), taca, 0.0) for taca in ways]
    if config.lora is not None:
        found.append(Variant(f"{describe_gamma(config.taca)} + LoRA", config.taca, 1.0))
    return found


def _compared(config: AttentionConfig) -> str:
    """The variant that stands for TACA: its own without the LoRA, or else the last without one."""
    assert config.taca is not None
    without_lora = [variant.name for variant in variants(config) if not variant.lora_strength]
    own = describe_gamma(config.taca)
    return own if own in without_lora else without_lora[-1]


def _check(pipeline: Pipeline, config: AttentionConfig, batch: Batch) -> None:
    """Raises UserError, before anything is drawn, for a picture's size or a layer that the model
    does not have."""
    assert config.taca is not None
    sigmas = pipeline.sigmas(config.height, config.width, 1)
    plan = make_plan(sigmas, config.taca, loras=pipeline.loras)
    jax.eval_shape(
        partial(shares_of_step, pipeline.transformer, layer=config.layer),
        batch.text,
        pipeline.noise(len(batch.prompts), config.height, config.width),
        jax.tree.map(lambda x: x[0], plan),
        batch.words,
    )


def _are_shapes(pipeline: Pipeline, prompts: Sequence[str]) -> bool:
    """Whether the model draws pictures of the shapes data, and the prompts are captions of it."""
    if not isinstance(pipeline.tokenizer, WordTokenizer):
        return False
    try:
        for prompt in prompts:
            parse_caption(prompt)
    except UserError:
        return False
    return True


def _summary(name: str, found: Mapping[str, Measured]) -> str:
    """A variant's share of attention on text, at the first and at the last step, in a line."""
    text, plain = (found[each].text.mean(axis=1) for each in (name, next(iter(found))))
    ratio = "" if name == next(iter(found)) else f" ({text[0] / plain[0]:.3f} times plain's)"
    return (
        f"{name}: {text[0]:.1%} of attention on text at step 1{ratio}, {text[-1]:.1%} at the last"
    )


def _numbers(
    found: Mapping[str, Measured],
    config: AttentionConfig,
    words: Sequence[str],
    timesteps: np.ndarray,
) -> dict:
    """For JSON: means over pictures and positions; lists are over steps, layers and heads.

    text_ratio: of a variant's share of attention on text to plain attention's.
    """
    plain = next(iter(found.values()))

    def means(measured: Measured) -> dict:
        first = measured.heads[:, : config.num_images]  # pictures of the first prompt
        return {
            "gamma": _rounded(measured.gamma),
            "text": _rounded(measured.text.mean(axis=1)),
            "text_ratio": _rounded(measured.text.mean(axis=1) / plain.text.mean(axis=1)),
            "words": {
                word: _rounded(first[:, :, 1 + i].mean(axis=(1, 2, 3)))
                for i, word in enumerate(words)
            },
            "claims": _rounded(measured.claims.mean(axis=1)),
            "text_by_layer_and_head": _rounded(measured.heads[:, :, 0].mean(axis=1)),
        }

    return {
        "prompts": config.prompts,
        "num_images": config.num_images,
        "timesteps": _rounded(timesteps),
        "variants": {name: means(measured) for name, measured in found.items()},
    }


def _rounded(array: np.ndarray) -> list:
    """As nested lists of numbers with six decimal places."""
    return np.round(array.astype(np.float64), 6).tolist()
