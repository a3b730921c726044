"""Lists of prompts in files, a line each: plain text, or JSON with settings of the line's own."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from taca_jax.config.json_text import from_json
from taca_jax.errors import UserError
from taca_jax.pipelines.config import GenerateConfig

JSON_LINES = ".jsonl"
"""The suffix of files with a JSON object in each line; all others are plain text."""


@dataclass(frozen=True)
class Line:
    """What a line may set; the fields are those of GenerateConfig."""

    prompt: str
    negative_prompt: str | None
    seed: int
    height: int | None
    width: int | None
    guidance: float | None


def read_prompts(config: GenerateConfig) -> dict[int, GenerateConfig]:
    """The command of each line of the file `config.prompts`, by the line's number, from 1.

    It is `config` with the prompt of the line and, from a JSON line, its own seed, height, width,
    negative prompt and guidance. Blank lines are skipped. Raises UserError that names the file and
    the line for one that is no such line, and for a file that is missing or has no prompt.
    """
    assert config.prompts is not None
    file = Path(config.prompts)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"prompts={file} is not UTF-8 text; give a file of prompts") from None
    except OSError as error:
        raise UserError(
            f"prompts={file} cannot be read ({error.strerror}); give a text file with a prompt in "
            f"each line, or a {JSON_LINES} file"
        ) from None
    found = dict(_lines(config, file, text))
    if not found:
        raise UserError(f"prompts={file} has no prompt; write one in each line")
    return found


def where(config: GenerateConfig, number: int) -> str:
    """How messages name a line."""
    return f"{config.prompts}, line {number}"


def _lines(config: GenerateConfig, file: Path, text: str) -> Iterator[tuple[int, GenerateConfig]]:
    names = Line.__dataclass_fields__
    defaults = {name: getattr(config, name) for name in names} | {"prompt": ""}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        said = where(config, number)
        if file.suffix == JSON_LINES:
            given = _object(line, said)
        else:
            _refuse_json(line, said)
            given = {"prompt": line.strip()}
        own = from_json(Line, json.dumps(defaults | given), said)
        if not own.prompt.strip():
            raise UserError(f'{said}: prompt is empty; say what to draw: {{"prompt": "a cup"}}')
        try:
            yield number, replace(config, **asdict(own), prompts=None, out="line.png")
        except UserError as error:
            raise UserError(f"{said}: {error}") from None


def _object(line: str, said: str) -> dict:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{said} is not JSON ({error.msg}, column {error.colno}); write "
            '{"prompt": "a cup", "seed": 1}, or name the file .txt for plain prompts'
        ) from None
    if not isinstance(given, dict):
        raise UserError(f'{said} is no JSON object; write {{"prompt": ...}}')
    return given


def _refuse_json(line: str, said: str) -> None:
    """Raises UserError for a JSON object in a file of plain prompts, where it would be drawn."""
    try:
        is_object = isinstance(json.loads(line), dict)
    except ValueError:
        return
    if is_object:
        raise UserError(f"{said} is JSON; name the file {JSON_LINES}")
