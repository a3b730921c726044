"""The configuration of the training data."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from taca_jax.errors import UserError

KINDS = ("tfds", "generated", "folder", "webdataset", "img2dataset")
_FORMS = "folder:PATH, webdataset:PATTERN, img2dataset:PATH, tfds:NAME or generated:shapes"


@dataclass(frozen=True)
class DataConfig:
    """Where pictures and captions come from, and how they are put into batches.

    source: `folder:PATH` of pictures with `captions.jsonl` or a .txt or .json beside each (this and
      all other paths may be in a bucket: `folder:gs://BUCKET/FOLDER`),
      `webdataset:PATTERN` of tars (`path/{00000..00099}.tar`), `img2dataset:PATH`, the output
      folder of that program, `tfds:NAME` of a data set with captions that TFDS has prepared as
      array_record, or the folder of one (`tfds:coco_captions#train[:10%]`; `#SPLIT` is `train` if
      not given), `tfds:shapes/small` (or `large`, `tiny`; built on first use) or
      `generated:shapes/SIZE`, the same drawn while training (SIZE is a million if not given; with
      `#spatial` after it only that category is drawn). Several in a comma list (a JSON list where
      names hold commas) are mixed.
    batch_size: samples per forward pass, over all devices.
    resolution: pixels per side of the square that each picture is cropped and resized to, or whose
      area buckets have; shapes have 40.
    weights: how often each of several sources is drawn from, in proportion; if empty, every picture
      is drawn equally often.
    aspect: `square` crops each picture to a square, `buckets` to the rectangle, of several, whose
      aspect is nearest to its own; a batch is of one rectangle, and the step is compiled for each.
    max_aspect: the largest ratio of a bucket's longer side to its shorter one.
    min_side: pictures with a side of fewer pixels are left out.
    caption: with `{}` in it, what is made of each caption: the picture's own replaces `{}`
      ("a photo of {}"). Without `{}`, the caption of pictures that have none. With none, captions
      are as they are, and pictures without one are left out.
    caption_dropout: the share of captions replaced by the empty one, for classifier-free guidance.
    encode: `online` encodes pictures and captions in every step; `cache` encodes them once, before
      training, which then has no text encoder in memory, and the autoencoder only for samples.
    cache: the folder of encoded examples, which later runs may use again, and which may be in a
      bucket (gs://BUCKET/FOLDER); with none, it is within the run's own folder.
    latents: of the autoencoder's distribution for a picture, `mean` trains on its mean, `sample` on
      a random sample, a new one in every step.
    max_bad_share: training stops when more than this share of the pictures is missing, corrupt or
      without a caption; up to that they are skipped, counted and named in the log.
    seed: decides the order, the dropped captions, and which of several captions is used.

    Raises UserError for values out of range, and for those that do not fit together.
    """

    source: tuple[str, ...] = ("tfds:shapes",)
    batch_size: int = 64
    resolution: int = 40
    weights: tuple[float, ...] = ()
    aspect: Literal["square", "buckets"] = "square"
    max_aspect: float = 2.0
    min_side: int = 0
    caption: str | None = None
    caption_dropout: float = 0.1
    encode: Literal["online", "cache"] = "online"
    cache: str | None = None
    latents: Literal["mean", "sample"] = "mean"
    max_bad_share: float = 0.05
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,))
        for source in self.source or ("",):
            check_source(source, "data.source")
        given, sources = len(self.weights), len(self.source)
        if given not in (0, sources):
            raise UserError(
                f"data.weights has {given} numbers for {sources} sources; give one each, or none "
                "(data.weights=)"
            )
        for weight in self.weights:
            if not 0 < weight < math.inf:
                raise UserError(f"data.weights has {weight}; each must be positive and finite")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size is {self.batch_size}; it must be 1 or more")
        if self.resolution < 8:
            raise UserError(f"data.resolution is {self.resolution}; it must be 8 or more pixels")
        if not 1 <= self.max_aspect <= 16:
            raise UserError(f"data.max_aspect is {self.max_aspect}; it must be between 1 and 16")
        if self.aspect == "square" and self.max_aspect != DataConfig.max_aspect:
            raise UserError(
                f"data.max_aspect is {self.max_aspect}, which data.aspect=square does not read; "
                "set data.aspect=buckets"
            )
        if self.min_side < 0:
            raise UserError(f"data.min_side is {self.min_side}; it must be 0 or more pixels")
        if self.caption is not None:
            said = f"data.caption is {self.caption or 'empty'}"
            if not self.caption.strip():
                raise UserError(f"{said}; give a text, a template with {{}}, or none")
            for source in self.source:
                if re.fullmatch("(tfds|generated):shapes([/#].*)?", source):
                    raise UserError(
                        f"{said}, and {source} has captions of its own words for all its pictures; "
                        "set data.caption=none"
                    )
        shares = {"caption_dropout": self.caption_dropout, "max_bad_share": self.max_bad_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"data.{name} is {share}; it must be between 0 and 1")
        if self.cache is not None and self.encode != "cache":
            raise UserError(
                f"data.cache is {self.cache}, which data.encode={self.encode} does not read; set "
                "data.encode=cache"
            )
        if self.seed < 0:
            raise UserError(f"data.seed is {self.seed}; it must be 0 or more")


def check_source(source: str, key: str) -> None:
    """Raises UserError, with the name of the `key`, unless `source` has the form of a source."""
    kind, _, place = source.partition(":")
    if kind not in KINDS or not place:
        raise UserError(f"{key} is {source or 'empty'}; it must be {_FORMS}")
