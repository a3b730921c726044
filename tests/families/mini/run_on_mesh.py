"""Trains the third family over a mesh of all devices; prints its losses.

python -m tests.families.mini.run_on_mesh CONFIG_JSON
"""

import json
import sys
from pathlib import Path

from taca_jax.config.json_text import from_json
from taca_jax.families.registry import register
from taca_jax.training.config import TrainConfig
from taca_jax.training.run import train
from tests.families.mini.family import MINI


def main() -> None:
    register(MINI)
    config = from_json(TrainConfig, Path(sys.argv[1]).read_text())
    train(config)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    print(json.dumps([json.loads(line)["loss"] for line in lines]))


if __name__ == "__main__":
    main()
