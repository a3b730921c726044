"""The shapes data set on disk: a TFDS builder (array_record, without TensorFlow) and `load`.

The same examples are drawn on demand, without files, by `examples.GeneratedShapes`.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from taca_jax.caches import cache_folder
from taca_jax.data.shapes.drawing import IMAGE_SIZE
from taca_jax.data.shapes.examples import SPLITS, Example, GeneratedShapes
from taca_jax.errors import UserError
from taca_jax.loggers import silenced
from taca_jax.telling.bars import shown

_SEED = 0
_BYTES_PER_EXAMPLE = 1100  # needed by a build, which writes every example twice


@dataclass
class ShapesConfig(tfds.core.BuilderConfig):
    """How many examples each split has; those of a smaller config begin a larger one."""

    train: int = 0
    validation: int = 0
    test: int = 0


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Small pictures of coloured, textured shapes with captions, in T2I-CompBench's categories."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar = [
        ShapesConfig(
            name="small", description="LoRA training", train=20_000, validation=1_000, test=2_000
        ),
        ShapesConfig(
            name="large", description="a base model", train=300_000, validation=1_000, test=2_000
        ),
        ShapesConfig(name="tiny", description="tests", train=64, validation=16, test=16),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(IMAGE_SIZE, IMAGE_SIZE, 3), encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "category": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=None,
            disable_shuffling=True,  # they are drawn in random order
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, object]]]:
        examples = GeneratedShapes(split, getattr(self.builder_config, split), _SEED)
        for index, example in enumerate(shown(examples, f"drawing {split}", len(examples))):
            yield index, {**example, "image": _png(example["image"])}


class StoredShapes:
    """The examples of one split of a built data set, by index."""

    def __init__(self, builder: Shapes, split: str):
        # Pictures are decoded in __getitem__, because TFDS warns when it decodes without OpenCV.
        decoders = {"image": tfds.decode.SkipDecoding()}
        # TFDS's decorators hide the method's signature.
        self._source = builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0..{len(self) - 1}")
        record = self._source[index]
        with Image.open(BytesIO(record["image"])) as image:
            pixels = np.asarray(image, np.uint8)
        return {
            "image": pixels,
            "caption": record["caption"].decode(),
            "category": record["category"].decode(),
            "id": record["id"].decode(),
        }


def load(
    config: Literal["small", "large", "tiny"] = "small",
    split: str = "train",
    data_dir: str | os.PathLike[str] | None = None,
) -> StoredShapes:
    """A split of the data set under `data_dir`, by default `~/.cache/taca_jax/tfds`, which is built
    there on first use.

    Other processes wait for the one that builds, and what an interrupted build has left is removed.
    Raises UserError for an unknown config or split, a folder that cannot be written, a disk with
    too little space, and damaged files.
    """
    configs = [known.name for known in Shapes.BUILDER_CONFIGS]
    if config not in configs:
        raise UserError(f"shapes config {config!r} is not one of {', '.join(configs)}")
    if split not in SPLITS:
        raise UserError(f"shapes split {split!r} is not one of {', '.join(SPLITS)}")
    root = Path(data_dir).expanduser() if data_dir else cache_folder("tfds")
    folder = root / Shapes.name / config / str(Shapes.VERSION)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / "shapes.lock"):
            if not folder.exists():
                _build(config, root, folder)
    except OSError as error:
        raise UserError(f"cannot build the shapes data set in {root}: {error}") from error
    try:
        builder = _builder(config, root)
        stored = StoredShapes(builder, split)
        expected = getattr(builder.builder_config, split)
        if len(stored) != expected:
            raise ValueError(f"{len(stored)} examples where {expected} were written")
        stored[expected - 1]
    except Exception as error:  # TFDS and array_record raise errors of many classes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the shapes data set is damaged ({reason}): remove {folder} and run again, "
            "which builds it anew"
        ) from error
    return stored


def _builder(config: str, root: Path) -> Shapes:
    return Shapes(data_dir=str(root), config=config, file_format="array_record")


def _build(config: str, root: Path, folder: Path) -> None:
    # TFDS writes to a folder of such a name, and renames it at the end.
    for left in folder.parent.glob("incomplete.*"):
        shutil.rmtree(left)
    (sizes,) = (known for known in Shapes.BUILDER_CONFIGS if known.name == config)
    needed = _BYTES_PER_EXAMPLE * sum(getattr(sizes, split) for split in SPLITS)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(
            f"the shapes data set {config!r} needs {needed / 2**20:.0f} MiB in {root}, "
            f"where {free / 2**20:.0f} MiB are free; let XDG_CACHE_HOME name another disk"
        )
    counts = ", ".join(f"{getattr(sizes, split):,} {split}" for split in SPLITS)
    print(f"building the shapes data set ({counts} examples), once: {folder}", file=sys.stderr)
    tfds.disable_progress_bar()  # it counts shards and downloads; ours counts examples
    try:
        # TFDS warns that the data set is not there yet.
        with contextlib.redirect_stdout(StringIO()), silenced("absl", below=logging.ERROR):
            _builder(config, root).download_and_prepare(file_format="array_record")
    finally:
        tfds.enable_progress_bar()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the file's lock, which the system releases if the process is killed."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _png(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
