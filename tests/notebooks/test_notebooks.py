"""The notebooks: what lies in the repository, and that every cell runs, with small stand-ins for
the released weights."""

import json
import re
import tomllib
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from tests.shared import shared_path  # noqa: E402
from tests.weights import small_flux, small_sd3  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ("flux2_klein_taca", "flux_taca", "quickstart_shapes", "sd35_medium_taca")
UNKNOWN = "https://github.com/OWNER/taca_jax"
"""Stands in for the repository's address until pyproject.toml's `project.urls` has a Repository."""

by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def repository() -> str:
    """Owner and name, as in the address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = project["urls"].get("Repository", UNKNOWN)
    return address.removeprefix("https://github.com/").removesuffix(".git").strip("/")


def cells(path: Path, kind: str) -> list[str]:
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_these_are_all():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES


@by_name
def test_outputs_are_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


@by_name
def test_it_needs_nothing_but_the_public_api(path):
    for source in cells(path, "code"):
        for line in re.findall(r"^ *(?:from|import) .*taca_jax.*", source, re.M):
            assert line == "import taca_jax as tj"
        for program in re.findall(r"^ *%run (.*?)--config", source, re.M):
            assert program in {f"-m taca_jax {each} " for each in PROGRAMS}


PROGRAMS = ("generate", "train", "eval attention")


@pytest.mark.parametrize(
    "page",
    [*NOTEBOOKS, ROOT / "docs/tutorials/colab.md"],
    ids=lambda path: path.name,
)
def test_addresses_are_those_of_the_repository(page):
    owner_and_name = r"([\w.-]+/[\w.-]+?)"
    text = page.read_text()
    links = re.findall(
        r"\]\(https://colab\.research\.google\.com/github/"
        rf"{owner_and_name}/blob/main/notebooks/(\w+)\.ipynb\)",
        text,
    )
    assert sorted(name for _, name in links) == ([page.stem] if page in NOTEBOOKS else list(NAMES))
    if page.name != "colab.md":  # the site loads nothing from elsewhere
        badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]("
        assert text.count(badge) == len(links)
    installed = re.findall(rf"git\+https://github\.com/{owner_and_name}(?:\.git)?[\"'\\]", text)
    assert len(installed) == (page in NOTEBOOKS)
    assert {*installed, *(found for found, _ in links)} == {repository()}


def test_no_page_has_another_address():
    """If it fails because pyproject.toml was given the repository's address, replace OWNER/taca_jax
    in the files that it names."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *ROOT.glob("docs/**/*.md"), *NOTEBOOKS]
    other = [
        str(page.relative_to(ROOT))
        for page in pages
        for found in re.findall(r"github(?:\.com)?/([\w.-]+/taca[_-]jax)\b", page.read_text())
        if found != repository()
    ]
    assert not other


def run(notebook, folder: Path, stand_in: str, monkeypatch) -> list[str]:
    """Runs all cells in a folder, where compiled programs are kept for the next run; returns what
    each code cell printed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TACA_JAX_STAND_IN", stand_in)
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    said = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    # A program that ends with an error does not make its cell fail.
    assert not re.search(r"^error:|SystemExit|usage:", "".join(said), re.M), said
    return said


def read(name: str):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    said = run(read("quickstart_shapes"), tmp_path, "shapes_base", monkeypatch)
    assert "cpu: uses this machine's memory" in said[1]
    assert "gamma 1.5" in said[3]
    for file in ("compare.png", "mine.png", "attention/words.png"):
        assert (tmp_path / file).is_file()
    assert (tmp_path / "runs" / "shapes_taca" / "evaluation.png").is_file()


NEEDED = ("BASE = ", "RESULTS = ", "PICTURES = ", "RUN = ")
"""What the cells begin to define that are to be run again when a session has died."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("flux2_klein_taca", lambda _: shared_path("golden/flux2")),
        ("flux_taca", small_flux.write_diffusers),
        ("sd35_medium_taca", small_sd3.write_diffusers),
    ],
)
def test_the_notebook_of_a_released_model_runs_and_goes_on(tmp_path, monkeypatch, name, small):
    base = small(tmp_path / "base")
    run(read(name), tmp_path, str(base), monkeypatch)
    results = tmp_path / "taca_results" / name
    for file in ("plain", "taca", "taca_lora"):
        assert (results / f"{file}.png").is_file()
    assert len(list(results.glob("attention-*/words.png"))) == 1
    lora = results / "my_lora" / "lora.safetensors"
    before = lora.read_bytes()

    again = read(name)
    again.cells = [
        cell
        for cell in again.cells
        if cell.cell_type == "code" and re.search("^ *" + "|^ *".join(NEEDED), cell.source, re.M)
    ]
    assert len(again.cells) == len(NEEDED)
    again.cells[0].source += '\nTRAIN = TRAIN.replace("steps=4", "steps=6")'
    said = run(again, tmp_path, str(base), monkeypatch)
    assert "going on after step 4" in said[-1]
    assert lora.read_bytes() != before
