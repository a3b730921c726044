"""Upstream's two scorers of pictures, in JAX: each gives a picture and its prompt a score."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.categories import BLIP_VQA, CLIP_SCORE, Metric
from taca_jax.evaluation.compbench.phrases import describe_source, phrase_splitter
from taca_jax.evaluation.digests import digest_of
from taca_jax.nn.kinds import ModelKind, kind_of
from taca_jax.scorers.blip import BLIP_KIND
from taca_jax.scorers.clip import CLIP_SCORE_KIND
from taca_jax.scorers.folder import TOKENIZER, TOKENIZER_FILES
from taca_jax.scorers.pixels import blip_pixels, clip_pixels
from taca_jax.scorers.questions import QUESTION_TOKENS, question_about
from taca_jax.text.tokenizers import FolderTokenizer, announce_cuts
from taca_jax.weights.folders import load_config, load_model
from taca_jax.weights.loading import LoadOptions

DIGITS = 16
"""Of the digests of weights in settings, which `compbench report` shows."""


class Judge(ABC):
    """A scorer's model and tokenizer, applied to batches of one size.

    metric: which of upstream's scorers it is. categories: those that it judges. settings: what its
    scores depend on, with digests of its weights and its phrases.
    """

    metric: ClassVar[Metric]
    categories: ClassVar[tuple[str, ...]]
    settings: Mapping[str, Any]

    @abstractmethod
    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError if one of the prompts cannot be judged."""

    @abstractmethod
    def scores(self, paths: Sequence[Path], prompts: Sequence[str]) -> list[str | float]:
        """The score of each picture, as upstream writes it."""


class CLIPJudge(Judge):
    """CLIPScore: the cosine of the picture and the whole prompt."""

    metric = CLIP_SCORE
    categories = ("non_spatial",)

    def __init__(self, folder: Path, dtype: str):
        config = _checked(folder, CLIP_SCORE_KIND)
        self.settings = {
            "weights": digest_of(folder)[:DIGITS],
            "image_size": config.image.image_size,
            "dtype": dtype,
        }
        self._tokenizer = FolderTokenizer(folder / TOKENIZER, config.text.max_tokens)
        self._model = nnx.split(load_model(folder, _options(dtype)))
        self._pixels = partial(clip_pixels, size=config.image.image_size)

    def check(self, prompts: Sequence[str]) -> None:
        announce_cuts(self._tokenizer, prompts)

    def scores(self, paths: Sequence[Path], prompts: Sequence[str]) -> list[str | float]:
        pixels = _read(paths, self._pixels)
        return np.asarray(_cosines(*self._model, pixels, self._tokenizer(prompts))).tolist()


class BLIPJudge(Judge):
    """BLIP-VQA: the product over a prompt's noun phrases of how probable "yes", and not "no", is as
    the answer to "PHRASE?"; rounded to four decimals for each phrase and again at the end, as
    upstream does."""

    metric = BLIP_VQA
    categories = ("color", "shape", "texture")

    def __init__(self, folder: Path, dtype: str, phrases: str):
        config = _checked(folder, BLIP_KIND)
        size = config.image.image_size
        self._split = phrase_splitter(phrases)
        self.settings = {
            "weights": digest_of(folder)[:DIGITS],
            "image_size": size,
            "dtype": dtype,
            "phrases": describe_source(phrases),
        }
        self._tokenizer = FolderTokenizer(folder / TOKENIZER, QUESTION_TOKENS)
        self._question_token = config.question_token
        # Of the ids of one word, the first is [CLS].
        self._yes, self._no = (int(self._tokenizer([word])[0, 1]) for word in ("yes", "no"))
        self._model = nnx.split(load_model(folder, _options(dtype)))
        self._pixels = partial(blip_pixels, size=size)

    def check(self, prompts: Sequence[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            self._split(prompt)

    def scores(self, paths: Sequence[Path], prompts: Sequence[str]) -> list[str | float]:
        phrases = [self._split(prompt) for prompt in prompts]
        images = _embedded(*self._model, _read(paths, self._pixels))
        products = [1.0] * len(prompts)
        for place in range(max(map(len, phrases))):
            asked = [each[place] if place < len(each) else "" for each in phrases]
            for i, said in enumerate(self._probabilities(images, asked)):
                products[i] *= said if asked[i] else 1.0
        return [f"{product:.4f}" for product in products]

    def _probabilities(self, images: Float[Array, "b s d"], asked: Sequence[str]) -> list[float]:
        tokens = self._tokenizer([question_about(phrase) for phrase in asked])
        mask = tokens != self._tokenizer.pad_id
        tokens[:, 0] = self._question_token
        yes = _yes(*self._model, images, tokens, mask, self._yes, self._no)
        return [round(each, 4) for each in np.asarray(yes, np.float64).tolist()]


@jax.jit(static_argnames="graph")
def _cosines(
    graph: nnx.GraphDef,
    state: nnx.State,
    pixels: Float[Array, "b h w 3"],
    tokens: Int[Array, "b t"],
) -> Float[Array, " b"]:
    return nnx.merge(graph, state)(pixels, tokens)


@jax.jit(static_argnames="graph")
def _embedded(
    graph: nnx.GraphDef, state: nnx.State, pixels: Float[Array, "b h w 3"]
) -> Float[Array, "b s d"]:
    return nnx.merge(graph, state).image(pixels)


@jax.jit(static_argnames="graph")
def _yes(
    graph: nnx.GraphDef,
    state: nnx.State,
    images: Float[Array, "b s d"],
    tokens: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    yes: int,
    no: int,
) -> Float[Array, " b"]:
    """p(yes) / (p(yes) + p(no)) of the answers' first words."""
    logits = nnx.merge(graph, state).first_word(images, tokens, mask)
    return jax.nn.sigmoid(logits[:, yes] - logits[:, no])


def _read(paths: Sequence[Path], pixels: Any) -> Float[np.ndarray, "b h w 3"]:
    """The pictures' pixels, read by several threads."""

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as picture:
                return pixels(picture)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); draw it again") from None

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(read, paths)))


def _options(dtype: str) -> LoadOptions:
    return LoadOptions(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))


def _checked(folder: Path, kind: ModelKind) -> Any:
    """The config of a scorer's folder. Raises UserError unless it is of this kind, with its
    tokenizer."""
    config = load_config(folder)
    found = kind_of(config).name
    if found != kind.name:
        raise UserError(
            f"{folder} is of kind {found}; expected {kind.name}, which `taca-convert "
            f"{kind.name}` makes"
        )
    if not any((folder / TOKENIZER / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder / TOKENIZER} has no tokenizer; copy its files "
            f"({', '.join(TOKENIZER_FILES[:3])}) there from the model's page"
        )
    return config
