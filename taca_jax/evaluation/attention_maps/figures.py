"""The figures of an analysis of attention, as PNG files."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from taca_jax.evaluation.attention_maps.measuring import Measured
from taca_jax.formats.atomic import whole_file
from taca_jax.pipelines.grids import caption_grid

Found = Mapping[str, Measured]
"""What was measured, by variant, plain attention first."""

_DPI = 150
_CELL = 1.6  # inches of a picture's side in a figure
_LETTERS_AN_INCH = 10  # of a title, at most
_FILM_SIDE = 256  # pixels, at most, of a picture's side in the film
_EARLY_STEPS = 4  # whose maps are drawn, at most


def draw(
    found: Found, compared: str, words: Sequence[str], timesteps: Float[np.ndarray, " n"], out: Path
) -> list[Path]:
    """Writes all figures to the folder `out` and returns their files.

    compared: the variant that is set against plain attention where there is room for one. words: of
    the first prompt.
    """
    paths = [
        _text(found, timesteps, out / "text.png"),
        _heads(found, compared, out / "heads.png"),
        _differences(found, timesteps, out / "difference.png"),
        _film(found, timesteps, out / "x0.png"),
    ]
    if words:
        paths.append(_words(found, compared, words, out / "words.png"))
    if len(next(iter(found.values())).claims):
        paths.append(_alignment(found, timesteps, out / "alignment.png"))
    return paths


def _text(found: Found, timesteps: Float[np.ndarray, " n"], path: Path) -> Path:
    """The share of attention on text over the steps (the paper's figure 4)."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    shares, ratios = figure.subplots(1, 2)
    text = {name: each.text.mean(axis=1) for name, each in found.items()}
    plain = next(iter(text.values()))
    _curves(shares, {name: 100 * share for name, share in text.items()}, timesteps)
    shares.set_ylabel("% of image tokens' attention on text")
    _curves(ratios, {name: share / plain for name, share in text.items()}, timesteps)
    ratios.set_ylabel("times plain attention's")
    shares.set_ylim(bottom=0)
    _legend(ratios)
    return _written(figure, path)


def _alignment(found: Found, timesteps: Float[np.ndarray, " n"], path: Path) -> Path:
    """How much of the prompt each step's predicted picture shows (the paper's figure 8b)."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    claims = {name: 100 * each.claims.mean(axis=1) for name, each in found.items()}
    _curves(axes, claims, timesteps)
    axes.set_ylabel("% of claims in the predicted picture")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return _written(figure, path)


def _curves(
    axes: Axes, curves: Mapping[str, Float[np.ndarray, " n"]], timesteps: Float[np.ndarray, " n"]
) -> None:
    """A line for each variant over the steps, with the timesteps above."""
    steps = np.arange(1, len(timesteps) + 1)
    hot = [name for name in curves if "LoRA" not in name][1:]
    shades = mpl.colormaps["YlOrRd"](np.linspace(0.4, 0.9, len(hot)))
    colors = dict(zip(hot, shades, strict=True))
    for name, curve in curves.items():
        if name in colors:
            axes.plot(steps, curve, color=colors[name], label=name)
        elif "LoRA" in name:
            axes.plot(steps, curve, "--", color="tab:blue", label=name)
        else:
            axes.plot(steps, curve, color="black", label=name, zorder=3)
    axes.set_xlabel("sampling step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines["right"].set_visible(False)
    above = axes.secondary_xaxis("top")
    shown = steps[:: max(1, len(steps) // 6)]
    above.set_xticks(shown, [f"{timesteps[step - 1]:.0f}" for step in shown])
    above.set_xlabel("timestep")


def _legend(axes: Axes) -> None:
    """The variants, beside the curves."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)


def _heads(found: Found, compared: str, path: Path) -> Path:
    """The share on text of each layer and head at the first step, and what TACA makes of it."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plain, taca = (
        each.heads[0, :, 0].mean(axis=0) for each in (next(iter(found.values())), found[compared])
    )
    for axes, values, title, style in (
        (left, 100 * plain, "plain: % of attention on text", {"cmap": "viridis", "vmin": 0}),
        (right, taca / plain, f"{compared}: times plain's", {"cmap": "inferno"}),
    ):
        drawn = axes.imshow(values, aspect="auto", **style)
        figure.colorbar(drawn, ax=axes)
        axes.set(title=title, xlabel="head", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("step 1")
    return _written(figure, path)


def _differences(found: Found, timesteps: Float[np.ndarray, " n"], path: Path) -> Path:
    """Where in the first picture attention on text is higher than in plain attention, at early
    steps (the paper's figure 6)."""
    steps = min(_EARLY_STEPS, len(timesteps))
    plain = next(iter(found.values()))
    higher = {
        name: 100 * (each.maps[:steps, 0, 0] - plain.maps[:steps, 0, 0])
        for name, each in found.items()
        if each is not plain
    }
    figure, grid = _cells(1 + len(higher), 1 + steps)
    figure.suptitle("% of attention on text: plain, and the difference from it")
    for row, (name, each) in enumerate(found.items()):
        _show_picture(grid[row, 0], each.drawn[0])
        grid[row, 0].set_ylabel(name)
    share = 100 * plain.maps[:steps, 0, 0]
    most = max((np.abs(each).max() for each in higher.values()), default=0)
    shares = ScalarMappable(Normalize(share.min(), share.max()), "viridis")
    differences = ScalarMappable(Normalize(-most, most), "RdBu_r")
    for step in range(steps):
        grid[0, 1 + step].set_title(f"step {1 + step}, t = {timesteps[step]:.0f}", fontsize=9)
        rows = [(share, shares), *((each, differences) for each in higher.values())]
        for row, (values, colors) in enumerate(rows):
            grid[row, 1 + step].imshow(values[step], norm=colors.norm, cmap=colors.cmap)
    figure.colorbar(shares, ax=[*grid[0]], shrink=0.9)
    if higher:
        figure.colorbar(differences, ax=[*grid[1:].flat], shrink=0.9 / len(higher))
    return _written(figure, path)


def _words(found: Found, compared: str, words: Sequence[str], path: Path) -> Path:
    """Each word's share of attention over the pictures, mean over all steps."""
    both = {name: found[name] for name in dict.fromkeys([next(iter(found)), compared])}
    pictures = len(next(iter(both.values())).drawn)
    figure, grid = _cells(pictures * len(both), 1 + len(words))
    title = "share of attention, mean of all steps: brighter is more; % at the brightest"
    figure.suptitle(textwrap.fill(title, int(_LETTERS_AN_INCH * figure.get_figwidth())))
    grid[0, 0].set_title("picture", fontsize=9)
    for column, word in enumerate(words, start=1):
        grid[0, column].set_title(word, fontsize=9)
    for picture in range(pictures):
        maps = {name: 100 * each.maps[:, picture, 1:].mean(axis=0) for name, each in both.items()}
        for row, name in enumerate(both, start=picture * len(both)):
            drawn = both[name].drawn[picture]
            _show_picture(grid[row, 0], drawn)
            grid[row, 0].set_ylabel(name)
            for word, axes in enumerate(grid[row, 1:]):
                values = [each[word] for each in maps.values()]
                _show_heat(
                    axes,
                    drawn,
                    maps[name][word],
                    (min(each.min() for each in values), max(each.max() for each in values)),
                )
    return _written(figure, path)


def _film(found: Found, timesteps: Float[np.ndarray, " n"], path: Path) -> Path:
    """The first picture as each step predicts it, a row for each variant (the paper's figure 3)."""
    pictures, names = [], []
    steps = next(iter(found.values())).film_steps
    for name, each in found.items():
        for film in each.film[:, 0]:
            picture = Image.fromarray(film)
            picture.thumbnail((_FILM_SIDE, _FILM_SIDE))
            pictures.append(picture)
            names.append(name)
    headings = [f"step {1 + step}, t = {timesteps[step]:.0f}" for step in steps]
    grid = caption_grid(pictures, names, columns=len(steps), headings=headings)
    with whole_file(path) as file:
        grid.save(file, format="PNG")
    return path


def _cells(rows: int, columns: int) -> tuple[Figure, Any]:
    """A figure of equal square cells without ticks, and its axes `[rows, columns]`."""
    size = (_CELL * columns + 1.2, _CELL * rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure, grid


def _show_picture(axes: Axes, picture: UInt8[np.ndarray, "H W 3"]) -> None:
    axes.imshow(picture, interpolation=_interpolation(picture))


def _show_heat(
    axes: Axes,
    picture: UInt8[np.ndarray, "H W 3"],
    values: Float[np.ndarray, "r c"],
    limits: tuple[float, float],
) -> None:
    """A map in %, smoothly enlarged, over a pale picture, with its largest value in the corner."""
    height, width, _ = picture.shape
    grey = picture.mean(axis=2)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation=_interpolation(picture))
    axes.imshow(
        values,
        cmap="inferno",
        vmin=limits[0],
        vmax=limits[1],
        alpha=0.65,
        interpolation="bilinear",
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
    )
    axes.text(0.03, 0.04, f"{values.max():.2g}", transform=axes.transAxes, color="w", fontsize=7)


def _interpolation(picture: UInt8[np.ndarray, "H W 3"]) -> str:
    """Small pictures are enlarged with their pixels visible, large ones are reduced smoothly."""
    return "nearest" if picture.shape[1] < _CELL * _DPI else "antialiased"


def _written(figure: Figure, path: Path) -> Path:
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=_DPI)
    return path
