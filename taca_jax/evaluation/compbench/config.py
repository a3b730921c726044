"""The configurations of the commands of T2I-CompBench."""

from dataclasses import dataclass
from typing import Literal

from taca_jax.config.fields import check
from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.categories import (
    BLIP_VQA,
    CLIP_SCORE,
    METRICS,
    TABLE,
    Category,
)
from taca_jax.evaluation.sweeps import AxesConfig
from taca_jax.pipelines.config import SamplingConfig
from taca_jax.sampling.loop import MAX_SEED


@dataclass(frozen=True)
class PicturesConfig(SamplingConfig):
    """What `compbench generate` draws.

    prompts: the folder of upstream's lists, `color_val.txt` and so on: `examples/dataset` of
      github.com/Karine-Huang/T2I-CompBench; or a file of other prompts, one a line, for the one
      category whose scorer is to judge them.
    out: the folder to write to; with the same settings it is completed.
    categories: what to draw of color, shape, texture, spatial, 3d_spatial, numeracy, non_spatial
      and complex.
    limit: only the first prompts of each list; none takes all.
    num_images: pictures of each prompt.
    seed: of the noise of each prompt's first picture; its other ones take seed + 1, seed + 2, ... .
    batch_size: pictures drawn at a time, of the same or successive prompts.
    """

    seed: int = 42
    prompts: str = "T2I-CompBench/examples/dataset"
    out: str = "runs/compbench"
    categories: tuple[Category, ...] = TABLE
    limit: int | None = None
    num_images: int = 10
    batch_size: int = 10

    def __post_init__(self):
        super().__post_init__()
        limit = self.limit
        check(bool(self.prompts), "prompts", "empty", "the folder of the lists")
        check(bool(self.out), "out", "empty", "the folder to write to")
        distinct = bool(self.categories) and len(set(self.categories)) == len(self.categories)
        said = ",".join(self.categories) or "empty"
        check(distinct, "categories", said, "one or more, without repetition")
        check(limit is None or limit >= 1, "limit", limit, "1 or more, or none")
        check(self.num_images >= 1, "num_images", self.num_images, "1 or more")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        last = self.seed + self.num_images - 1
        check(last <= MAX_SEED, "the last picture's seed", last, f"at most {MAX_SEED}")


@dataclass(frozen=True)
class ScoreConfig:
    """What `compbench score` scores: color, shape and texture by BLIP-VQA, non_spatial by
    CLIPScore.

    pictures: the folder that `compbench generate` wrote; upstream's layout in a folder for each
      category (`color/samples/*.png`) will do.
    blip: the folder that `taca-convert blip_vqa` made; none leaves its categories out.
    clip: the folder that `taca-convert clip_score` made; none leaves its category out.
    phrases: where the noun phrases come from that BLIP is asked about: `spacy` as in upstream,
      `rules` of our own, which need no model, or a JSON file that maps prompts to lists of phrases.
    batch_size: pictures scored at a time.
    dtype: of the scorers' activations and parameters.
    """

    pictures: str
    blip: str | None = None
    clip: str | None = None
    phrases: str = "spacy"
    batch_size: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.blip is None and self.clip is None:
            raise UserError("blip and clip are both none; give the folder of at least one scorer")
        check(bool(self.phrases), "phrases", "empty", "spacy, rules or a JSON file")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class SweepConfig(PicturesConfig, AxesConfig):
    """Many settings of TACA compared on T2I-CompBench: the same prompts, drawn from the same noise.

    out: the folder for the results, with a folder of `compbench generate` for each setting; an
      interrupted sweep goes on where it was, and so does one to whose axes values were added.
    categories: what to draw and score: color, shape and texture by BLIP-VQA, non_spatial by
      CLIPScore.
    limit: only the first prompts of each list; none takes all. A larger one goes on too.
    num_images: pictures of each prompt. More prompts say more than more pictures of each.
    blip: the folder that `taca-convert blip_vqa` made.
    clip: the folder that `taca-convert clip_score` made.
    phrases: as `compbench score` takes them.

    Raises UserError for values out of range.
    """

    out: str = "runs/compbench_sweep"
    categories: tuple[Category, ...] = ("color", "shape", "texture")
    limit: int | None = 20
    num_images: int = 1
    blip: str | None = None
    clip: str | None = None
    phrases: str = "spacy"

    @property
    def scoring(self) -> ScoreConfig:
        """How pictures are scored.

        Raises UserError if no scorer is given, and for categories that none of them judges: not
        where this is made, since a preset has no scorers.
        """
        config = ScoreConfig(self.out, blip=self.blip, clip=self.clip, phrases=self.phrases)
        given = [BLIP_VQA] * (self.blip is not None) + [CLIP_SCORE] * (self.clip is not None)
        judged = [category for category, metric in METRICS.items() if metric in given]
        for category in self.categories:
            if category not in judged:
                raise UserError(
                    f"categories has {category}, which no given scorer judges; they judge "
                    f"{', '.join(judged)}"
                )
        return config


@dataclass(frozen=True)
class ReportConfig:
    """What `compbench report` shows.

    runs: folders with scores, a row each; all further ones are compared with the first.
    names: of the rows; by default the folders' own.
    out: the JSON file to write; none writes none.
    """

    runs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    out: str | None = None

    def __post_init__(self):
        named = len(self.names) in (0, len(self.runs))
        check(named, "names", ",".join(self.names), f"one for each of the {len(self.runs)} runs")
        for name, what in {"runs": "folders", "names": "names"}.items():
            given = getattr(self, name)
            check(len(set(given)) == len(given), name, ",".join(given), f"distinct {what}")
        right = self.out is None or self.out.endswith(".json")
        check(right, "out", self.out, "the name of a .json file, or none")
