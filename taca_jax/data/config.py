"""Where pictures and captions come from, as a configuration."""

from dataclasses import dataclass

from taca_jax.errors import UserError

_FORMS = "tfds:shapes, generated:shapes or folder:PATH"


@dataclass(frozen=True)
class DataConfig:
    """Where pictures and captions come from.

    source: `tfds:shapes/small` (or `large`, `tiny`; the training split, built on first use),
      `generated:shapes/SIZE` (the same drawn on the fly; a million without a SIZE), or
      `folder:PATH` of pictures with `captions.jsonl` or a .txt beside each.
    batch_size: samples per forward pass, over all devices.
    resolution: pixels per side of the square that each picture is resized and cropped to; shapes
      have 40.
    caption_dropout: the share of captions replaced by the empty one, for classifier-free guidance.
    max_bad_share: training stops when more than this share of the pictures is missing, corrupt or
      without a caption; the others are counted, named in the log and skipped.
    seed: decides the order and the dropped captions.
    """

    source: str = "tfds:shapes"
    batch_size: int = 64
    resolution: int = 40
    caption_dropout: float = 0.1
    max_bad_share: float = 0.05
    seed: int = 0

    def __post_init__(self):
        kind, _, place = self.source.partition(":")
        if kind not in ("tfds", "generated", "folder") or not place:
            raise UserError(f"data.source is {self.source or 'empty'}; it must be {_FORMS}")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size is {self.batch_size}; it must be 1 or more")
        if self.resolution < 8:
            raise UserError(f"data.resolution is {self.resolution}; it must be 8 or more pixels")
        shares = {"caption_dropout": self.caption_dropout, "max_bad_share": self.max_bad_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"data.{name} is {share}; it must be between 0 and 1")
        if self.seed < 0:
            raise UserError(f"data.seed is {self.seed}; it must be 0 or more")
