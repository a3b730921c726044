"""The wheel: what it holds, and that it works without the checkout that it was built from."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from taca_jax.commands import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked, as it would be in site-packages."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel (in the test extra)")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    done = subprocess.run([*build, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder / "site")
    return folder / "site"


def test_it_takes_no_name_but_its_own(wheel):
    (info,) = wheel.glob("taca_jax-*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {"taca_jax", info.name}


def test_it_holds_all_modules_presets_and_data(wheel):
    def files(folder: Path) -> set[Path]:
        found = (path for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file())
        return {path.relative_to(folder) for path in found}

    presets = {
        Path("presets") / path.name
        for path in (ROOT / "configs").glob("*.py")
        if path.name != "__init__.py"
    }
    assert files(wheel / "taca_jax") == files(ROOT / "taca_jax") | presets
    for needed in ("py.typed", "weights/shipped/shapes_taca.safetensors"):
        assert (wheel / "taca_jax" / needed).is_file()


def test_its_commands_are_the_programs(wheel):
    (entries,) = wheel.glob("*.dist-info/entry_points.txt")
    lines = [line for line in entries.read_text().splitlines() if "=" in line]
    programs = {f"taca-{name} = {module}:main" for name, (module, _) in PROGRAMS.items()}
    assert programs <= set(lines)


def test_it_says_what_it_is_and_its_extras_are_small(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    said = Parser().parsestr(metadata.read_text())
    assert said["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    needed = [each for each in said.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert not [each for each in needed if each.startswith(("torch", "diffusers", "tensorflow>"))]


def test_its_presets_are_found_without_the_checkout(wheel, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(wheel), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "taca_jax", "generate", "--config"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["flux2_taca", "flux_taca", "sd35_taca", "shapes_taca"]
    where = "import taca_jax.presets.shapes_taca as preset; print(preset.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(wheel / "taca_jax" / "presets" / "shapes_taca.py")
