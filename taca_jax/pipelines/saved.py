"""Drawing with what a training run made: the configuration that its folder implies."""

import json
from pathlib import Path
from typing import Any

from taca_jax.config.json_text import from_json
from taca_jax.config.presets import read_record
from taca_jax.errors import UserError
from taca_jax.pipelines.config import GenerateConfig

SHARED = ("tokenizers", "taca", "dtype", "quantize", "quantize_text", "attention")
"""Fields that mean the same in training and in drawing."""


def saved_drawing(file: Path) -> GenerateConfig:
    """The GenerateConfig that a JSON file holds, or that draws as the run whose record it is.

    Of a run: with its base and its LoRA (of the newest checkpoint, while there is no last one), or
    with its model; with TACA as it was trained, and gamma as it was learnt. Steps, size and
    guidance are the model's own. Raises UserError where the file is neither, and where the run has
    not yet made what is drawn with.
    """
    text = read_record(file)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON ({error}); give a run's record") from None
    if not isinstance(record, dict) or "steps" not in record or "name" not in record:
        return from_json(GenerateConfig, text, str(file))
    folder = file.parent
    values = {name: record[name] for name in SHARED if name in record}
    if record.get("lora") is None and record.get("gamma_knots") is None:
        values["base"] = str(_there(folder / "model", "model"))
    else:
        values["base"] = record.get("base")
        if record.get("lora") is not None:
            values["lora"] = str(_lora(folder))
        if record.get("gamma_knots") is not None:
            values["taca"] = _learnt(_there(folder / "taca.json", "learnt gamma"))
    return from_json(GenerateConfig, json.dumps(values), str(file))


def _lora(folder: Path) -> Path:
    """The LoRA of a run's end, or of its newest checkpoint."""
    last = folder / "lora.safetensors"
    newest = sorted((folder / "loras").glob("step-*.safetensors"))
    return newest[-1] if newest and not last.is_file() else _there(last, "LoRA")


def _there(path: Path, what: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is not there: the run has written no {what} yet; let it go on")
    return path


def _learnt(file: Path) -> Any:
    return json.loads(read_record(file))
