"""Several sources as one, and what can be done with either."""

from collections.abc import Sequence
from itertools import accumulate

from taca_jax.data.sources.source import Example, PictureSource, Source


class MixedSource:
    """Several sources, one after the other, as one."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = tuple(parts)
        self._starts = (0, *accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        part, within = self.find(index)
        return part[within]

    def find(self, index: int) -> tuple[Source, int]:
        """The source of example `index`, and the example's index in that source.

        Raises IndexError where there is no such example.
        """
        for part, start in zip(self.parts, self._starts, strict=False):
            if start <= index < start + len(part):
                return part, index - start
        raise IndexError(f"index {index} is not in 0..{len(self) - 1}")


def parts_of(source: Source) -> Sequence[Source]:
    """The sources that a mixed source is made of; of any other, the source itself."""
    return source.parts if isinstance(source, MixedSource) else (source,)


def read_example(source: Source, index: int, size: tuple[int, int] | None) -> Example:
    """Example `index`, its picture cropped and resized to (height, width); None: as `[index]`.

    Raises BadExampleError if it cannot be read.
    """
    if size is None:
        return source[index]
    part, within = source.find(index) if isinstance(source, MixedSource) else (source, index)
    # All pictures of another source have one size, and a bucket that they are in has it too.
    return part.read(within, size) if isinstance(part, PictureSource) else part[within]


def summaries(source: Source) -> list[str]:
    """What was skipped, a line for each of the parts of `source` that had bad examples."""
    bad = [part.bad.summary() for part in parts_of(source) if isinstance(part, PictureSource)]
    return [line for line in bad if line]
