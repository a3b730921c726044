"""The configuration of the page, and of `app.py`."""

from dataclasses import dataclass

from taca_jax.config.fields import check
from taca_jax.errors import UserError
from taca_jax.pipelines.config import SamplingConfig

_PORTS = 65535


@dataclass(frozen=True)
class PageConfig(SamplingConfig):
    """What the page draws with, who reaches it, and how much visitors may ask for.

    The keys of drawing (seed, steps, guidance, height, width, taca.gamma, ...) are what stands in
    the page at first; visitors change them. `lora` is chosen at first.

    prompt: what stands in the page at first.
    lora_folder: a folder; its LoRA files (`*.safetensors`, not those of folders in it) can be
      chosen in the page. None offers `lora` alone.
    host: the address that is listened at: 127.0.0.1 is reached from this machine alone, 0.0.0.0
      from every machine.
    port: the port there.
    max_side: pixels, at most, of a picture's longer side; none is as height and width say, or the
      model's own resolution.
    max_steps: steps, at most.
    max_prompt: characters, at most, of a prompt.
    queue: visitors, at most, who wait for their pictures; others are asked to come back.
    kept: drawings whose steps and words can be looked at; the oldest are forgotten.

    Raises UserError for values out of range.
    """

    base: str = "shapes_base"
    prompt: str = "a green circle above a blue square"
    lora_folder: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    max_side: int | None = None
    max_steps: int = 50
    max_prompt: int = 1000
    queue: int = 16
    kept: int = 16

    def __post_init__(self):
        super().__post_init__()
        check(bool(self.host), "host", "empty", "an address, such as 127.0.0.1")
        check(1 <= self.port <= _PORTS, "port", self.port, f"1 to {_PORTS}")
        side = self.max_side
        check(side is None or side >= 8, "max_side", side, "8 or more pixels, or none")
        for name in ("max_steps", "max_prompt", "queue", "kept"):
            value = getattr(self, name)
            check(value >= 1, name, value, "1 or more")
        steps = self.steps
        check(steps is None or steps <= self.max_steps, "steps", steps, "at most max_steps")
        if self.taca is None:
            raise UserError("the page compares plain with TACA; leave taca on (not taca=none)")
        if self.taca.first_steps is not None or self.taca.knots is not None:
            raise UserError(
                "the page sets gamma, threshold and schedule, which taca.first_steps and "
                "taca.knots stand in place of; leave those out"
            )
