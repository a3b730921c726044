"""constraints.txt: a version of everything that the package needs, within its bounds."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(python: str) -> dict[str, str]:
    """The version of each package for a version of Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [
        pin for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": python})
    ]
    names = [canonicalize_name(pin.name) for pin in here]
    assert len(set(names)) == len(names)
    return {
        name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, here, strict=True)
    }


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_requirement_has_a_version_within_its_bounds(python):
    pins = pinned(python)
    for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]):
        needed = Requirement(line)
        if needed.name == "libtpu":  # left to jax[tpu]
            continue
        version = pins.get(canonicalize_name(needed.name), "none")
        assert needed.specifier.contains(version), f"{line} on Python {python}: {version}"
