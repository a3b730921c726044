"""Compares many settings of TACA on shapes: strength, threshold, schedule, LoRA, guided half.

Every setting draws the same prompts from the same noise, so that differences are paired. What was
drawn is kept, so that an interrupted sweep goes on where it was, and a further setting costs only
its own pictures.
"""

from typing import Literal

Half = Literal["both", "conditional"]
