"""How often the recogniser of shapes (`shapes.py`) errs, on pictures whose contents are known.

True pictures are drawn, then damaged: by noise, by blur, or by erasing half of an object. Each is
judged by its own caption and by that of another picture of the same category, and the verdict is
compared with what the drawn scene truly shows; of half an object the truth is that it is not there.
Every object that was drawn is also looked up, to see with what each attribute is confused.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from taca_jax.config.fields import check
from taca_jax.data.shapes.captions import COLORS, PLAIN, SAID_TEXTURES, SHAPES, Description
from taca_jax.data.shapes.drawing import BACKGROUND, Placed, draw
from taca_jax.data.shapes.examples import Scene, random_scene
from taca_jax.errors import UserError
from taca_jax.evaluation.shapes.recogniser import FoundObject, judge, read_scene
from taca_jax.evaluation.statistics import share_interval
from taca_jax.formats.atomic import whole_file
from taca_jax.telling.bars import shown

ATTRIBUTES = {"color": COLORS, "shape": SHAPES, "texture": (PLAIN, *SAID_TEXTURES)}
"""What an object has, and the values that each may take."""

NOTHING = "nothing"
"""Read where no object is found, or none whose attribute is recognised."""

_NEAR = 4  # pixels between the centres of a drawn object and the one that is found for it


@dataclass(frozen=True)
class RecogniserConfig:
    """The measurement of the recogniser's own error.

    scenes: pictures for each kind of damage, half of the training split's compositions and half
      held-out ones.
    noise: standard deviations of Gaussian noise, of 255.
    blur: standard deviations of a Gaussian blur, in pixels of the 40 x 40.
    seed: of the scenes and the damage.
    out: a JSON file for all counts; none writes no file.

    Raises UserError for values out of range.
    """

    scenes: int = 2000
    noise: tuple[float, ...] = (8.0, 16.0, 32.0, 48.0, 64.0)
    blur: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5)
    seed: int = 0
    out: str | None = None

    def __post_init__(self):
        check(self.scenes >= 2, "scenes", self.scenes, "2 or more")
        for name in ("noise", "blur"):
            values = getattr(self, name)
            check(all(v > 0 for v in values), name, values, "positive numbers")
        check(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass(frozen=True)
class Damage:
    """One way to damage a picture: `none`, `noise` or `blur` of a strength, or `half` an object."""

    kind: str
    strength: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.strength:g}" if self.strength else self.kind

    def apply(
        self, scene: Scene, rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[Placed, ...]]:
        """The damaged picture, uint8 [40, 40, 3], and the objects that are still whole."""
        image = draw(scene.placed)
        if self.kind == "half":
            lost = scene.placed[rng.integers(len(scene.placed))]
            _erase_half(image, lost, rng)
            return image, tuple(item for item in scene.placed if item is not lost)
        pixels = image.astype(np.float64)
        if self.kind == "noise":
            pixels += rng.normal(0, self.strength, pixels.shape)
        elif self.kind == "blur":
            pixels = ndimage.gaussian_filter(pixels, self.strength, axes=(0, 1), mode="nearest")
        return np.clip(np.round(pixels), 0, 255).astype(np.uint8), scene.placed


def _erase_half(image: np.ndarray, item: Placed, rng: np.random.Generator) -> None:
    """Paints the background over the left, right, upper or lower half of an object."""
    first, along_rows = rng.integers(2), rng.integers(2)
    rows, columns = [item.y, item.y + item.size], [item.x, item.x + item.size]
    side = rows if along_rows else columns
    side[int(first)] = side[0] + item.size // 2
    image[slice(*rows), slice(*columns)] = BACKGROUND


@dataclass(frozen=True)
class Counts:
    """The verdicts and readings of all pictures with one kind of damage.

    verdicts: for each judged caption the picture's number, whether the picture truly shows it, and
    whether the recogniser says so. readings: by attribute, for each drawn object the picture's
    number, the value that was drawn, and the one that was read.
    """

    verdicts: list[tuple[int, bool, bool]]
    readings: dict[str, list[tuple[int, str, str]]]

    def confusions(self, attribute: str) -> Counter[tuple[str, str]]:
        """How often a drawn value (first) was read as another (second)."""
        return Counter((drawn, read) for _, drawn, read in self.readings[attribute])


def measure(config: RecogniserConfig) -> dict[Damage, Counts]:
    """Judges `config.scenes` pictures for each kind of damage; the same scenes for all."""
    kinds = [
        Damage("none"),
        *(Damage("noise", strength) for strength in config.noise),
        *(Damage("blur", strength) for strength in config.blur),
        Damage("half"),
    ]
    scenes = list(_scenes(config))
    others = _captions_of_others(scenes)
    return {
        damage: _count(damage, scenes, others, config.seed)
        for damage in shown(kinds, "judging pictures", len(kinds))
    }


def _scenes(config: RecogniserConfig) -> Iterator[Scene]:
    for i in range(config.scenes):
        yield random_scene(("train", "test")[i % 2], config.seed, i // 2)


def _captions_of_others(scenes: Sequence[Scene]) -> list[Description]:
    """For each scene the description of the next one of its category, its own for the only one."""
    last: dict[str, int] = {}
    first: dict[str, int] = {}
    following = list(range(len(scenes)))
    for i, scene in enumerate(scenes):
        if scene.category in last:
            following[last[scene.category]] = i
        first.setdefault(scene.category, i)
        last[scene.category] = i
    for category, i in last.items():
        following[i] = first[category]
    return [scenes[i].description for i in following]


def _count(
    damage: Damage, scenes: Sequence[Scene], others: Sequence[Description], seed: int
) -> Counts:
    counts = Counts([], {attribute: [] for attribute in ATTRIBUTES})
    for number, (scene, other) in enumerate(zip(scenes, others, strict=True)):
        image, placed = damage.apply(scene, np.random.default_rng([seed, number]))
        found = read_scene(image)
        truth = [_truly(item) for item in placed]
        for description in (scene.description, other):
            verdict = number, _shows(description, truth), _shows(description, found)
            counts.verdicts.append(verdict)
        for item in truth:
            read = _nearest(item, found)
            for attribute, readings in counts.readings.items():
                readings.append((number, getattr(item, attribute), _value(read, attribute)))
    return counts


def _shows(description: Description, objects: Sequence[FoundObject]) -> bool:
    return judge(description, objects).correct


def _truly(item: Placed) -> FoundObject:
    """A drawn object as the recogniser should find it."""
    thing, size = item.object, item.size
    assert thing.color is not None
    center = item.x + size / 2, item.y + size / 2
    return FoundObject(
        thing.color, thing.shape, thing.texture, center, (item.x, item.y, size, size), 1.0
    )


def _nearest(item: FoundObject, found: Sequence[FoundObject]) -> FoundObject | None:
    """The object found where `item` is; of several the one whose colour is right, then nearest."""

    def rank(other: FoundObject) -> tuple[bool, float]:
        return other.color != item.color, _distance(item, other)

    near = [other for other in found if _distance(item, other) <= _NEAR]
    return min(near, key=rank, default=None)


def _distance(a: FoundObject, b: FoundObject) -> float:
    return float(np.hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]))


def _value(read: FoundObject | None, attribute: str) -> str:
    return (getattr(read, attribute) if read is not None else None) or NOTHING


def summary(counts: dict[Damage, Counts]) -> dict[str, dict[str, Any]]:
    """For JSON, by damage: the shares of `accepted` (true captions said to be right), `refused`
    (false ones said to be wrong) and of each attribute read right, and the confusions."""
    rows = {}
    for damage, each in counts.items():
        rows[damage.name] = {
            "accepted": _share([(number, said) for number, true, said in each.verdicts if true]),
            "refused": _share([(n, not said) for n, true, said in each.verdicts if not true]),
            **{
                attribute: _share([(number, drawn == read) for number, drawn, read in readings])
                for attribute, readings in each.readings.items()
            },
            "confusions": {
                attribute: {
                    f"{drawn} as {read}": count
                    for (drawn, read), count in sorted(each.confusions(attribute).items())
                }
                for attribute in each.readings
            },
        }
    return rows


def _share(outcomes: Sequence[tuple[int, bool]]) -> dict[str, Any] | None:
    """The share of outcomes that are right, each given with its picture's number, and an interval
    that takes pictures as the independent units; None where nothing was judged."""
    if not outcomes:
        return None
    pictures, right = zip(*outcomes, strict=True)
    share = asdict(share_interval(right, pictures))
    return {**share, "pictures": share.pop("prompts")}


def tables(rows: dict[str, dict[str, Any]]) -> list[Table]:
    """The shares by damage, in %: of the verdicts with 95 % intervals, and of the attributes."""
    verdicts = _by_damage(
        "What the recogniser says of pictures whose contents are known, % (95 % interval)",
        {"true captions accepted": "accepted", "false ones refused": "refused"},
        rows,
        lambda s: f"{100 * s['value']:.2f} ({100 * s['low']:.1f}-{100 * s['high']:.1f})",
    )
    attributes = _by_damage(
        "What it reads right of each object, %",
        {attribute: attribute for attribute in ATTRIBUTES},
        rows,
        lambda s: f"{100 * s['value']:.2f}",
    )
    return [verdicts, attributes]


def _by_damage(
    title: str,
    columns: Mapping[str, str],
    rows: Mapping[str, Mapping[str, Any]],
    said: Callable[[Any], str],
) -> Table:
    """A row for each damage, and columns by their headings, with what is `said` of a share."""
    out = Table(title=title, caption="damage: noise of 255, blur in pixels")
    out.add_column("damage")
    for heading in columns:
        out.add_column(heading, justify="right")
    for name, row in rows.items():
        out.add_row(name, *(said(row[key]) if row[key] else "-" for key in columns.values()))
    return out


def confusion_table(counts: dict[Damage, Counts], attribute: str) -> Table:
    """How often each drawn value of an attribute was read as each, in %, over all damage but half
    objects, which are not to be read."""
    pairs: Counter[tuple[str, str]] = Counter()
    for damage, each in counts.items():
        if damage.kind != "half":
            pairs += each.confusions(attribute)
    values = ATTRIBUTES[attribute]
    out = Table(title=f"{attribute}: drawn (row) and read (column), %, all damage together")
    out.add_column("")
    for read in (*values, NOTHING):
        out.add_column(read, justify="right")
    for drawn in values:
        total = max(1, sum(n for (value, _), n in pairs.items() if value == drawn))
        out.add_row(
            drawn, *(f"{100 * pairs[drawn, read] / total:.1f}" for read in (*values, NOTHING))
        )
    return out


def measure_recogniser(config: RecogniserConfig) -> None:
    """Measures, prints the tables, and writes `config.out`.

    Raises UserError where that cannot be written.
    """
    if config.out is not None and not Path(config.out).parent.is_dir():
        raise UserError(f"out={config.out}: its folder does not exist")
    counts = measure(config)
    rows = summary(counts)
    console = Console()
    for each in (*tables(rows), *(confusion_table(counts, attribute) for attribute in ATTRIBUTES)):
        console.print(each)
    if config.out is not None:
        with whole_file(Path(config.out)) as file:
            file.write_text(json.dumps(rows, indent=2) + "\n")
        print(f"wrote {config.out}")
