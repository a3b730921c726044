"""The T2I-CompBench scores that the authors of TACA published.

`published.json` has Table 1 of Lv et al. 2025 (arXiv:2506.07986), in the figures of their README,
github.com/Vchitect/TACA: mean scores by model and category.
"""

import json
from pathlib import Path

SOURCE = "published by the authors of TACA (github.com/Vchitect/TACA, arXiv:2506.07986)"

PUBLISHED: dict[str, dict[str, float]] = json.loads(Path(__file__).with_suffix(".json").read_text())
