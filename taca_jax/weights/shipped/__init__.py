"""Small trained weights that come with the package; README.md here says how they were made."""

from pathlib import Path


def find_weights(path: str | Path) -> Path:
    """`path`, or if it does not exist and is a plain name, the weights shipped under that name."""
    path = Path(path)
    shipped = Path(__file__).parent / path.name
    return shipped if not path.exists() and path.name == str(path) and shipped.exists() else path
