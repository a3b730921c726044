"""How far two arrays are apart."""

from typing import Any

import numpy as np


def relative_error(ours: Any, theirs: Any) -> float:
    """||ours - theirs|| / ||theirs||, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
