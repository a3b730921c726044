"""Small runs of T2I-CompBench: lists that the shapes model can read, and how to draw them."""

from pathlib import Path

from taca_jax.evaluation.commands import run
from taca_jax.evaluation.record import RECORD

PROMPTS = {
    "color": ("a red circle and a blue square", "a green cross and a red triangle"),
    "non_spatial": ("two red circles", "a square and a circle", "a blue circle"),
}


def write_lists(folder: Path) -> None:
    """The lists, with the line ends of three systems and a tab, none at the end of a file."""
    folder.mkdir(parents=True, exist_ok=True)
    color, non_spatial = PROMPTS.values()
    (folder / "color_val.txt").write_bytes("\tseen\r\n".join(color).encode())
    first, *others = non_spatial
    (folder / "non_spatial_val.txt").write_bytes(f"{first}\r{others[0]}\n{others[1]}".encode())


def words(lists: Path, out: Path, **changes: object) -> list[str]:
    """The command line that draws the lists: 5 prompts, 3 pictures of each, in 5 batches."""
    values = {
        "prompts": lists,
        "out": out,
        "categories": "color,non_spatial",
        "num_images": 3,
        "batch_size": 4,
        "steps": 2,
        **changes,
    }
    settings = [f"{key}={value}" for key, value in values.items()]
    return ["compbench", "generate", "--config", "shapes_taca", *settings]


def draw(lists: Path, out: Path, **changes: object) -> None:
    run(words(lists, out, **changes))


def files_in(folder: Path) -> dict[str, bytes]:
    """The contents of all files, by name, apart from the record, which says where weights are."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }
