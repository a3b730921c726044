"""What the page does, without the page: draws a prompt in two ways, and looks into the steps."""

import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from taca_jax.config.json_text import to_tree
from taca_jax.errors import UserError
from taca_jax.evaluation.attention_maps.measuring import conditioning, tokens_of_words
from taca_jax.evaluation.attention_maps.shares import shares_of_step
from taca_jax.page.config import PageConfig
from taca_jax.parallel.mesh import on
from taca_jax.parallel.processes import on_host
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.decoding import decode, to_pil
from taca_jax.pipelines.grids import enlarged
from taca_jax.pipelines.inputs import picture_size
from taca_jax.pipelines.lora_choice import LoRAChoice
from taca_jax.pipelines.loras import acting_loras
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.writing import png_info
from taca_jax.sampling.loop import make_plan
from taca_jax.taca import TacaConfig, gamma_at

_MOST_PROGRAMS = 12
"""Compiled programs, at most, that are kept: each number of steps and each size needs its own, and
visitors choose both."""


@dataclass(frozen=True)
class Column:
    """One way in which a prompt was drawn.

    taca: None for plain attention. picture: the result. before: the latents before each step. x0:
    the result that each step predicted, as latents.
    """

    taca: TacaConfig | None
    picture: Image.Image
    before: Float[np.ndarray, "n 1 h w c"]
    x0: Float[np.ndarray, "n 1 h w c"]


@dataclass(frozen=True)
class Drawing:
    """A prompt that was drawn plainly and with TACA from the same noise.

    timesteps: of the steps, in 0..1000.
    """

    settings: GenerateConfig
    timesteps: Float[np.ndarray, " n"]
    columns: tuple[Column, Column]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def gamma(self, step: int) -> float:
        """TACA's temperature at a step, counted from 0."""
        assert self.settings.taca is not None  # the page's configuration refuses that
        return float(gamma_at(self.settings.taca, self.timesteps[step]))


class Studio:
    """A pipeline, without LoRAs at first, that several visitors use, one at a time; and what it has
    drawn last.

    Raises UserError for a configured LoRA that cannot be used.
    """

    def __init__(self, pipeline: Pipeline, config: PageConfig):
        self.pipeline = pipeline
        self.config = config
        height, width = picture_size(config.height, config.width, pipeline.settings.resolution)
        self.height, self.width = height, width
        self.max_side = max(height, width) if config.max_side is None else config.max_side
        self._folder = TemporaryDirectory(prefix="taca-page-")
        self._lock = threading.Lock()  # of the transformer, whose LoRAs change
        self._attached: tuple[LoRAChoice, ...] = ()
        self._programs: set[tuple] = set()
        self._kept: OrderedDict[str, Drawing] = OrderedDict()
        self._attach(config.lora_choices)

    def keep(self, drawing: Drawing) -> str:
        """Keeps a drawing, and forgets the oldest of too many; returns the name to `recall` it."""
        name = secrets.token_urlsafe(16)
        self._kept[name] = drawing
        while len(self._kept) > self.config.kept:
            oldest, _ = self._kept.popitem(last=False)
            shutil.rmtree(self._folder_of(oldest), ignore_errors=True)
        return name

    def recall(self, name: str) -> Drawing:
        """The drawing that was kept under a name. Raises UserError if it was forgotten."""
        if name not in self._kept:
            raise UserError("the steps of this drawing are no longer kept; draw it again")
        return self._kept[name]

    def files(self, name: str) -> list[Path]:
        """The pictures of a drawing that is kept as PNG files, plain and with TACA, with the
        settings with which generate.py draws each of them; small ones are enlarged."""
        drawing, folder = self.recall(name), self._folder_of(name)
        folder.mkdir(exist_ok=True)
        paths = []
        for kind, column in zip(("plain", "taca"), drawing.columns, strict=True):
            path = folder / f"{kind}-seed{drawing.settings.seed}.png"
            settings = replace(drawing.settings, taca=column.taca, out=path.name)
            enlarged(column.picture).save(path, pnginfo=png_info(to_tree(settings)))
            paths.append(path)
        return paths

    def close(self) -> None:
        """Removes the files."""
        self._folder.cleanup()

    def _folder_of(self, name: str) -> Path:
        return Path(self._folder.name) / name

    def draw(self, settings: GenerateConfig, advance: Callable[[int, int], None]) -> Drawing:
        """Draws plainly and with TACA from the same noise. `advance(done, of)` is called at the
        start and after each step of both.

        Changes of prompt, seed, TACA and strengths run the program that is compiled already.
        Raises UserError for what is not possible.
        """
        pipeline = self.pipeline
        size = (settings.height, settings.width)
        timesteps = pipeline.timesteps(*size, settings.steps)
        noise = pipeline.noise(1, *size, settings.seed)
        with self._lock:
            text = pipeline.embeds(settings.prompt, guidance=settings.guidance)
            strengths = self._attach(settings.lora_choices)
            self._count_program((*noise.shape, len(timesteps), *text, *self._attached))
            total = 2 * len(timesteps)
            columns = []
            for column, taca in enumerate((None, settings.taca)):
                done = column * len(timesteps)
                advance(done, total)
                out = pipeline(
                    **text,
                    height=settings.height,
                    width=settings.width,
                    steps=settings.steps,
                    guidance=settings.guidance,
                    seed=settings.seed,
                    taca=taca,
                    lora_strength=strengths,
                    tiling=settings.tiling,
                    trajectory=True,
                    progress=False,
                    callback=lambda step, _, done=done: advance(done + step + 1, total),
                )
                assert isinstance(out.images, list)  # output="pil"
                assert out.trajectory is not None
                after, x0 = on_host(out.trajectory.latents), on_host(out.trajectory.x0)
                before = np.concatenate([on_host(noise)[None], after[:-1]])
                columns.append(Column(taca, out.images[0], before, x0))
        return Drawing(settings, timesteps, (columns[0], columns[1]))

    def predicted(self, drawing: Drawing, step: int) -> list[Image.Image]:
        """The result that each column predicted at a step, counted from 0; a preview's small
        autoencoder decodes it, if there is one."""
        if step == drawing.steps - 1:
            return [column.picture for column in drawing.columns]
        decoder = self.pipeline.previewer or self.pipeline.autoencoder
        assert decoder is not None  # which drawing has needed
        with on(self.pipeline.mesh):
            return [
                to_pil(decode(decoder, column.x0[step], drawing.settings.tiling))[0]
                for column in drawing.columns
            ]

    def look(self, drawing: Drawing, step: int, word: str) -> list[Float[np.ndarray, "r c"]]:
        """The share, 0 to 1, of each place's attention that a word of the prompt has at a step, in
        each column; the mean over layers and heads.

        Raises UserError for a word that the model does not read.
        """
        pipeline, settings = self.pipeline, drawing.settings
        with self._lock:
            strengths = self._attach(settings.lora_choices)
            loras = acting_loras(pipeline.transformer, pipeline.loras, strengths)
            text = conditioning(pipeline, [settings.prompt], settings.guidance)
            tokens = tokens_of_words(pipeline, settings.prompt, [word], 1)
            sigmas = pipeline.sigmas(settings.height, settings.width, drawing.steps)
            found = []
            for column in drawing.columns:
                plan = make_plan(sigmas, column.taca, loras=loras)
                latents = jnp.asarray(column.before[step])
                with on(pipeline.mesh):
                    now = jax.tree.map(lambda steps: steps[step], plan)
                    shares = shares_of_step(pipeline.transformer, text, latents, now, tokens)
                side = pipeline.config.patch_size
                of_word = on_host(shares.places)[0, 1]  # group 0 is all text
                found.append(of_word.reshape([n // side for n in latents.shape[1:3]]))
            return found

    def _attach(self, choices: Sequence[LoRAChoice]) -> tuple[float, ...]:
        """Has these LoRAs attached, and returns the strengths at which all that are attached act.

        Those that nobody asked for stay, at strength 0, since the program is compiled with them.
        """
        wanted = tuple(replace(each, strength=1.0) for each in choices)
        if not wanted:
            return (0.0,) * len(self.pipeline.loras)
        if wanted != self._attached:
            self._attached = ()
            self.pipeline.unload_lora()
            self.pipeline.load_lora(wanted)
            self._attached = wanted
        return tuple(each.strength for each in choices)

    def _count_program(self, program: tuple) -> None:
        """Forgets all compiled programs when a new one would be one too many."""
        if program not in self._programs and len(self._programs) >= _MOST_PROGRAMS:
            jax.clear_caches()
            self._programs.clear()
        self._programs.add(program)
