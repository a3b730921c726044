"""Decoding large pictures in overlapping square tiles.

An autoencoder's memory grows with the picture: at 2048 px a single activation of the full one is
2 GiB. All tiles have one shape, so that one compiled program decodes pictures of any size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from taca_jax.errors import UserError


@dataclass(frozen=True)
class Tiling:
    """How large pictures are decoded; sizes are in pixels.

    Each tile is decoded on its own: group norms and attention see only the tile, and its border is
    computed as if the picture ended there. So tiles should be no smaller than the pictures that the
    model was trained on, and neighbours are blended only in the middle half of their overlap, away
    from both borders.

    above: pictures of more than above x above pixels are decoded in tiles, others at once.
    size: side of a tile.
    overlap: least overlap of neighbouring tiles; at most half of size.

    Raises UserError for sizes that do not fit together.
    """

    above: int = 1536
    size: int = 1024
    overlap: int = 256

    def __post_init__(self):
        if self.above < 0:
            raise UserError(f"tiling.above is {self.above}; it must be 0 (always tiles) or more")
        if not 0 <= self.overlap <= self.size // 2:
            raise UserError(
                f"tiling.overlap is {self.overlap}; it must be 0 to {self.size // 2}, half of "
                f"tiling.size={self.size}"
            )

    def is_for(self, height: int, width: int) -> bool:
        """Whether a picture of this size is decoded in tiles."""
        return height * width > self.above**2 and max(height, width) > self.size

    def in_latents(self, downscale: int) -> tuple[int, int]:
        """Size and overlap in latent positions. Raises UserError unless they are whole numbers."""
        if not self.size or self.size % downscale or self.overlap % downscale:
            raise UserError(
                f"tiling.size is {self.size} and tiling.overlap {self.overlap}; this autoencoder "
                f"takes multiples of {downscale} pixels"
            )
        return self.size // downscale, self.overlap // downscale


TILING = Tiling()
"""The default of pipelines."""


def decode_in_tiles(
    decode: Callable[[Float[Array, "1 h w z"]], Float[ArrayLike, "1 H W c"]],
    latents: Float[Array, "b h w z"],
    tiling: Tiling,
    downscale: int,
) -> Float[np.ndarray, "b H W c"]:
    """Pictures of latents, float32, in host memory.

    `decode` is called with one tile of one sample at a time, and should be compiled. Raises
    UserError as `Tiling.in_latents` does.
    """
    size, overlap = tiling.in_latents(downscale)
    rows, columns = (_cut(side, size, overlap, downscale) for side in latents.shape[1:3])
    made: list[np.ndarray] = []
    for sample in range(latents.shape[0]):
        whole = np.zeros(0, np.float32)
        for row, row_weights in zip(rows.starts, rows.weights, strict=True):
            for column, column_weights in zip(columns.starts, columns.weights, strict=True):
                tile = jax.lax.dynamic_slice(
                    latents,
                    (sample, row, column, 0),
                    (1, rows.size, columns.size, latents.shape[3]),
                )
                piece = np.asarray(decode(tile), np.float32)[0]
                if not whole.size:
                    height, width = (side * downscale for side in latents.shape[1:3])
                    whole = np.zeros((height, width, piece.shape[2]), np.float32)
                top, left = row * downscale, column * downscale
                whole[top : top + len(row_weights), left : left + len(column_weights)] += (
                    row_weights[:, None, None] * column_weights[None, :, None] * piece
                )
        made.append(whole)
    return np.stack(made)


@dataclass(frozen=True)
class _Cuts:
    """One axis in overlapping pieces of one size; `weights` are each piece's blending weights."""

    starts: list[int]
    size: int
    weights: Float[np.ndarray, "pieces positions"]


def _cut(length: int, size: int, overlap: int, scale: int) -> _Cuts:
    """An axis in evenly spread pieces; their weights, at `scale` times the resolution, sum to 1."""
    if length <= size:
        return _Cuts([0], length, np.ones((1, length * scale), np.float32))
    count = -(-(length - overlap) // (size - overlap))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    weights = np.ones((count, size * scale), np.float32)
    for i in range(count - 1):
        shared = (starts[i] + size - starts[i + 1]) * scale
        if shared:
            rising = _rise(shared)
            weights[i + 1, :shared] *= rising
            weights[i, -shared:] *= rising[::-1]
    # Three pieces may overlap at one position, so the weights are normalised.
    total = np.zeros(length * scale, np.float32)
    spans = [slice(start * scale, (start + size) * scale) for start in starts]
    for span, own in zip(spans, weights, strict=True):
        total[span] += own
    for span, own in zip(spans, weights, strict=True):
        own /= total[span]
    return _Cuts(starts, size, weights)


def _rise(length: int) -> Float[np.ndarray, " length"]:
    """Rises smoothly from 0 to 1 within the middle half; it and its reverse sum to 1."""
    position = (np.arange(length) + 0.5) / length
    t = np.clip(2 * position - 0.5, 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)
