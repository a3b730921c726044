"""What README and docs tell people to type: every command is one that exists, with keys that exist,
Python blocks run, and links lead somewhere."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from taca_jax.config.command_line import parse_cli
from taca_jax.convert.cli import parse
from taca_jax.evaluation import commands
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.generate import generate
from taca_jax.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    ROOT / "taca_jax/weights/shipped/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
OTHERS = {"pre-commit", "pytest", "mkdocs", "source", "cd", "hf", "git", "gcloud", "xpk", "uv"}
"""Programs that are not ours."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def lines(page: Path) -> Iterator[list[str]]:
    """The commands of a page as words; lines go on after a backslash, and within quotes."""
    for block in blocks(page, "bash"):
        kept = ""
        for line in block.splitlines():
            kept += line.removesuffix("\\") + " "
            if line.endswith("\\"):
                continue
            try:
                words = shlex.split(kept, comments=True)
            except ValueError:  # no closing quotation yet
                continue
            kept = ""
            while "&&" in words:
                first = words.index("&&")
                yield words[:first]
                words = words[first + 1 :]
            if words:
                yield words
        assert not kept, f"{page.name}: {kept}"


def ours(page: Path) -> Iterator[list[str]]:
    """The commands of a page that run this project's programs, from the program on."""
    for words in lines(page):
        program = words[0].removeprefix(".venv/bin/")
        if program == "python":
            yield words[1:]
        elif program == "pip":
            yield ["pip", *words[1:]]
        else:
            assert program in OTHERS, f"{page.name}: is {words} a program?"


@pytest.fixture
def runs_nothing(monkeypatch):
    """Commands of the evaluation are parsed, and not run."""
    named = commands._named
    runs = {command.run for command in commands.COMMANDS.values()}
    monkeypatch.setattr(
        commands, "_named", lambda name: (lambda config: None) if name in runs else named(name)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_can_be_parsed(page, runs_nothing, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in ours(page):
        match words:
            case ["train.py", "--help"] | ["generate.py", "--help"]:
                pass
            case ["train.py", *rest]:
                parse_cli(rest, TrainConfig)
            case ["generate.py", *rest]:
                parse_cli(rest, GenerateConfig, attribute="GENERATE")
            case ["-m", "convert", *rest]:
                parse(rest)
            case ["-m", "taca_jax.evaluation", *rest]:
                commands.run(rest)
            case ["-m", "benchmarks", *_] | ["-m", "venv" | "spacy", *_]:
                pass
            case ["-m", module, *_]:
                assert importlib.util.find_spec(module), f"{page.name}: {module}"
            case ["pip", "install", *rest]:
                _check_extras(rest)
            case _:
                raise AssertionError(f"{page.name}: what is {words}?")


def _check_extras(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        for extras in re.findall(r"\.\[(.*)\]", word):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), word


def test_modules_in_the_text_exist():
    for page in PAGES:
        for module in re.findall(r"`python -m ((?:benchmarks|taca_jax)[\w.]*)", page.read_text()):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_keys_in_the_text_exist():
    """`taca.gamma=1.3` and the like, in text and tables."""
    from taca_jax.config.fields import fields_of

    known = {name for kind in (TrainConfig, GenerateConfig) for name in fields_of(kind)}
    groups = {name.partition(".")[0] for name in known if "." in name}
    for page in PAGES:
        for key in re.findall(r"`((\w+)\.\w+(?:\.\w+)*)=", page.read_text()):
            if key[1] in groups:
                assert key[0] in known, f"{page.name}: {key[0]}"


def _drawn() -> dict[str, GenerateConfig]:
    """Every picture of the model that comes with the package."""
    found = {}
    for page in PAGES:
        for words in ours(page):
            if words[0] == "generate.py" and "--help" not in words:
                config = parse_cli(words[1:], GenerateConfig, attribute="GENERATE")
                own = (config.lora or "").startswith("runs/")
                if config.base == "shapes_base" and not own:
                    found[" ".join(words[1:])] = config
    return found


def test_pictures_of_the_small_model_are_drawn(tmp_path):
    drawn = _drawn()
    assert drawn
    for i, config in enumerate(drawn.values()):
        out = tmp_path / f"{i}.png"
        written = generate(replace(config, steps=2, out=str(out), num_images=1))
        assert [file.is_file() for file in written] == [True]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    assert any(tmp_path.glob("*.png"))


def test_links_lead_to_files_and_headings():
    """GitHub's view of the pages; the site is checked when it is built."""
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if target.name == "configuration.md":  # made when the site is built
                continue
            assert target.exists(), f"{page.relative_to(ROOT)}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                slugs = {
                    re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
                }
                assert anchor in slugs, f"{page.relative_to(ROOT)}: {link}"
