"""Captioned pictures of any data set that TFDS (tensorflow_datasets) has prepared."""

import errno
import io
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds

from taca_jax.data.sources.bad_examples import BadExampleError, BadExamples, NoCaptionError
from taca_jax.data.sources.captions import (
    CAPTION_KEYS,
    GivenCaption,
    caption_from_json,
    caption_from_text,
)
from taca_jax.data.sources.source import PictureSource
from taca_jax.data.sources.stored_scans import stamps_of
from taca_jax.errors import UserError
from taca_jax.loggers import silenced
from taca_jax.storage import places

_RANDOM_ACCESS = "array_record"


class TfdsSource(PictureSource):
    """A split of a data set whose examples have one picture and one or more captions.

    The caption is the feature `caption`, `captions`, `text` or `name`, the first that there is. It
    is a text, a sequence of texts, or a sequence of records that have a `text`, as in COCO.
    """

    def __init__(
        self,
        place: str,
        resolution: int,
        max_bad_share: float,
        given: GivenCaption = GivenCaption(),  # noqa: B008
    ):
        """place: `NAME`, `NAME/CONFIG` or `NAME:VERSION` as in TFDS, or the folder of a prepared
        data set; then `#SPLIT`, a split or a part of one (`#train[:10%]`), or nothing for `train`.

        Raises UserError for a data set that is not prepared, that cannot be read at random, or that
        lacks a picture or a caption.
        """
        super().__init__(resolution, given)
        self._name, _, split = place.partition("#")
        self._split = split or "train"
        builder = _prepared(self._name)
        needed = given.default is None
        self._picture, self._captions = _features(self._name, builder.info.features, needed)
        if self._split.partition("[")[0] not in builder.info.splits:
            raise UserError(
                f"data.source is tfds:{place}; its splits are {', '.join(builder.info.splits)}"
            )
        decoders = {self._picture: tfds.decode.SkipDecoding()}
        try:
            # TFDS's decorators hide the method's signature.
            self._records = builder.as_data_source(self._split, decoders=decoders)  # pyright: ignore[reportCallIssue]
        except Exception as error:  # TFDS and array_record raise errors of many classes
            raise UserError(f"tfds:{place} cannot be read: {_reason(error)}") from error
        folder = places.place(os.fspath(builder.data_path))
        self._stamp = b"".join(stamps_of(sorted(folder.iterdir()))) + self._split.encode()
        self._last = threading.local()  # the last record, which the caption and the picture share
        self.bad = BadExamples(len(self), max_bad_share)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        return f"tfds:{self._name}#{self._split}, example {index}"

    def id(self, index: int) -> str:
        return f"{self._name}#{self._split}/{index}"

    def stamp(self) -> bytes:
        return self._stamp

    def _record(self, index: int) -> dict[str, Any]:
        if getattr(self._last, "index", None) != index:
            try:
                self._last.record = self._records[index]
            except Exception as error:  # for the same reason
                if "Too many open files" in str(error):
                    reason = "has more shards than files may be open; raise `ulimit -n`"
                    raise UserError(f"tfds:{self._name} {reason}") from error
                # Whether the file or the system is at fault is not known. It counts as the system,
                # so that a scan is not stored.
                refused = OSError(errno.EIO, _reason(error))
                raise BadExampleError(f"cannot be read: {_reason(error)}") from refused
            self._last.index = index
        return self._last.record

    def _caption(self, index: int) -> str | Sequence[str]:
        if self._captions is None:
            raise NoCaptionError("without a caption")
        found = self._record(index)[self._captions]
        found = found["text"] if isinstance(found, dict) else found
        if isinstance(found, bytes):
            return caption_from_text(found, f"its {self._captions}")
        try:
            captions = caption_from_json({"captions": [text.decode() for text in found]})
        except UnicodeDecodeError as error:
            raise BadExampleError(f"its {self._captions} is not UTF-8") from error
        if not captions:
            raise NoCaptionError(f"its {self._captions} is empty")
        return captions

    def _file(self, index: int) -> io.BytesIO:
        return io.BytesIO(self._record(index)[self._picture])


def _prepared(name: str) -> tfds.core.DatasetBuilder:
    """The builder of a data set that can be read. Raises UserError."""
    hint = f"prepare it with `tfds build ... --file_format={_RANDOM_ACCESS}`"
    folder = places.place(name).expanduser()
    places.reach(folder)
    try:
        with silenced("absl", below=logging.ERROR):
            if (folder / "dataset_info.json").is_file():
                builder = tfds.builder_from_directory(str(folder))
            else:
                builder = tfds.builder(name)
    except Exception as error:  # from the data set's own code, which may need other packages
        raise UserError(
            f"data.source is tfds:{name}: {_reason(error)}; give TFDS's name of a data set, or the "
            "folder where one is prepared"
        ) from error
    where = os.fspath(builder.data_path)
    if "://" in where and not places.is_bucket_name(where):
        raise UserError(f"tfds:{name} is at {where}; copy or mount it as a folder")
    if not builder.is_prepared():
        raise UserError(f"tfds:{name} is not in {builder.data_path}; {hint}")
    stored = builder.info.file_format
    if stored is None or stored.value != _RANDOM_ACCESS:
        kind = "unknown files" if stored is None else stored.value
        raise UserError(f"tfds:{name} is stored as {kind}, which cannot be shuffled; {hint}")
    return builder


def _features(name: str, features: Any, needs_caption: bool) -> tuple[str, str | None]:
    """The names of the picture's and the caption's feature. Raises UserError if one is missing."""
    pictures = [key for key, each in features.items() if isinstance(each, tfds.features.Image)]
    captions = [key for key in CAPTION_KEYS if key in features and _is_text(features[key])]
    if len(pictures) == 1 and (captions or not needs_caption):
        return pictures[0], captions[0] if captions else None
    lacks = "one picture an example" if captions else f"a caption ({' or '.join(CAPTION_KEYS)})"
    raise UserError(f"tfds:{name} lacks {lacks}; its features are {', '.join(sorted(features))}")


def _is_text(feature: Any) -> bool:
    """Whether it is a text, a record with a text, or a sequence of either."""
    if type(feature) is tfds.features.Sequence:  # not its subclass Dataset, which is an iterator
        feature = feature.feature
    if isinstance(feature, tfds.features.FeaturesDict):
        return "text" in feature and isinstance(feature["text"], tfds.features.Text)
    return isinstance(feature, tfds.features.Text)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
