"""The page's fields and pictures, in Gradio, and what happens when they are used."""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from taca_jax.errors import UserError
from taca_jax.page.heat import heated
from taca_jax.page.limits import NO_LORA, Asked, offered, settings_of
from taca_jax.page.studio import Drawing, Studio
from taca_jax.pipelines.grids import SMALL, enlarged
from taca_jax.sampling.loop import MAX_SEED
from taca_jax.taca import MAX_TIMESTEP, Gate, Schedule, describe_gamma, describe_steps
from taca_jax.text.tokenizers import WordTokenizer
from taca_jax.text.words import words_of

TITLE = "TACA: the same noise, drawn twice"

_INTRODUCTION = """# TACA: the same noise, drawn twice
On the left with plain attention, on the right with
[temperature-adjusted cross-modal attention](https://arxiv.org/abs/2506.07986): while the
composition is being decided, the picture attends more to the prompt."""

_EXAMPLES = (
    "a green circle above a blue square",
    "a striped red triangle and a yellow cross",
    "three purple diamonds",
    "a cyan cross left of a red circle",
)
"""Prompts that the small model of shapes can read."""

_NO_WORD = ""
_KEPT_FILES = (600, 3600)
"""Seconds: how often files that browsers have been given are looked through, and when they go."""

_GATES: list[tuple[str, Gate | str]] = [
    ("as its file says", ""),
    ("with TACA", "taca"),
    ("always", "always"),
]

_FIRST = "the first step; it is compiled for a new size or number of steps"
_CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
.prompt { align-items: flex-end; }
.pictures { flex-wrap: nowrap !important; align-items: flex-end !important; }
.picture { aspect-ratio: RATIO; overflow: hidden; }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain; }
.picture .empty { min-height: 0 !important; height: 100% !important; }
.picture [data-testid="status-tracker"]:has(.error) { display: none !important; }
.pixels img { image-rendering: pixelated; }
.about { min-height: 3.2em; }
@media (max-width: 640px) { h1 { font-size: 1.3rem !important; } }
"""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
"""Of the visitor's own machine: none is fetched."""


def css(studio: Studio) -> str:
    """The page's style sheet. The pictures' places keep their size while nothing is drawn."""
    return _CSS.replace("RATIO", f"{studio.width} / {studio.height}")


def build(studio: Studio) -> gr.Blocks:
    """The page of a studio. Its events wait in one queue, and one visitor draws at a time."""
    config, own = studio.config, studio.pipeline.settings
    steps = own.steps if config.steps is None else config.steps
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=_KEPT_FILES) as page:
        gr.Markdown(_INTRODUCTION)
        name = gr.State("")
        with gr.Row(elem_classes="prompt"):
            prompt = gr.Textbox(
                config.prompt,
                label="Prompt",
                scale=5,
                min_width=260,
                max_length=config.max_prompt,
                elem_id="prompt",
            )
            button = gr.Button("Draw", variant="primary", scale=1, min_width=100, elem_id="draw")
        if isinstance(studio.pipeline.tokenizer, WordTokenizer):
            gr.Examples([[each] for each in _EXAMPLES], prompt, label="It knows such prompts")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                seen = _results(studio, steps)
            with gr.Column(scale=1, min_width=280):
                fields = _fields(studio, steps)

        def draw(*values: Any, progress: gr.Progress = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
            def advance(done: int, total: int) -> None:
                which = "plain" if done <= total // 2 else "with TACA"
                progress((done, total), desc=which if done else _FIRST, unit="steps")

            with _told():
                progress(0, desc="waiting for the model")
                *most, gate, width, height = values
                wanted = Asked(*most, lora_gate=gate or None, width=width, height=height)
                drawing = studio.draw(settings_of(config, wanted, studio.max_side), advance)
                new = studio.keep(drawing)
                paths = studio.files(new)
            last, words = drawing.steps, words_of(drawing.settings.prompt)
            return (
                new,
                *_pictures(studio, drawing, last, _NO_WORD),
                gr.Slider(maximum=last, value=last, interactive=True),
                gr.Radio(
                    [("none", _NO_WORD), *((each, each) for each in words)],
                    value=_NO_WORD,
                    interactive=True,
                ),
                *(gr.DownloadButton(value=path, interactive=True) for path in paths),
            )

        def show(name: str, step: float, word: str) -> tuple[Any, ...]:
            with _told():
                drawing = studio.recall(name)
                # The slider may still be that of a drawing with more steps.
                return _pictures(studio, drawing, min(max(1, round(step)), drawing.steps), word)

        for start in (button.click, prompt.submit):
            start(
                draw,
                [prompt, *fields],
                [name, *seen.shown, seen.step, seen.word, *seen.files],
                show_progress_on=seen.pictures,
                api_visibility="private",
                concurrency_id="draw",
                concurrency_limit=1,
                trigger_mode="once",
            )
        for change in (seen.step.input, seen.word.input):
            change(
                show,
                [name, seen.step, seen.word],
                seen.shown,
                show_progress="hidden",
                api_visibility="private",
                concurrency_id="show",
                concurrency_limit=2,
                trigger_mode="always_last",
            )
        page.load(
            lambda: gr.Dropdown(choices=list(offered(config))),
            None,
            next(each for each in fields if each.elem_id == "lora"),
            show_progress="hidden",
            api_visibility="private",
        )
    return page.queue(max_size=config.queue, default_concurrency_limit=2)


@dataclass(frozen=True)
class _Results:
    """What shows a drawing: names, pictures and files of both columns, a line about the step, and
    what chooses the step and the word."""

    names: list[gr.Markdown]
    pictures: list[gr.Image]
    about: gr.Markdown
    step: gr.Slider
    word: gr.Radio
    files: list[gr.DownloadButton]

    @property
    def shown(self) -> list[Any]:
        """What `_pictures` fills."""
        return [*self.names, *self.pictures, self.about]


def _results(studio: Studio, steps: int) -> _Results:
    names, pictures, files = [], [], []
    small = max(studio.width, studio.height) < SMALL
    with gr.Row(elem_classes="pictures"):
        for each, heading in {"plain": "Plain", "taca": "With TACA"}.items():
            with gr.Column(min_width=120):
                names.append(gr.Markdown(f"**{heading}**"))
                picture = gr.Image(
                    label=heading,
                    show_label=False,
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id=each,
                    elem_classes=["picture", "pixels" if small else "smooth"],
                )
                pictures.append(picture)
    about = gr.Markdown("", elem_id="about", elem_classes="about")
    step = gr.Slider(
        minimum=1,
        maximum=steps,
        value=steps,
        step=1,
        label="Step",
        info="the pictures above are what this step predicts as the final ones",
        interactive=False,
        elem_id="step",
    )
    word = gr.Radio(
        [("none", _NO_WORD)],
        value=_NO_WORD,
        label="Word",
        info="shows which places attend to it in this step",
        interactive=False,
        elem_id="word",
    )
    with gr.Row():
        for each, label in {"plain": "Download plain", "taca": "Download TACA"}.items():
            button = gr.DownloadButton(
                label, interactive=False, size="md", min_width=120, elem_id=f"save-{each}"
            )
            files.append(button)
    return _Results(names, pictures, about, step, word, files)


def _fields(studio: Studio, steps: int) -> list[Any]:
    """The fields of what a visitor asks for, in the order of `Asked` after the prompt."""
    config, own = studio.config, studio.pipeline.settings
    taca = config.taca
    assert taca is not None  # the configuration refuses that
    with gr.Row():
        seed = gr.Number(
            config.seed,
            label="Seed",
            precision=0,
            minimum=0,
            maximum=MAX_SEED,
            min_width=110,
            elem_id="seed",
        )
        count = gr.Slider(
            *(1, config.max_steps, steps), step=1, label="Steps", min_width=150, elem_id="steps"
        )
    gamma = gr.Slider(
        *(1.0, max(2.0, taca.gamma), taca.gamma),
        step=0.01,
        label="Gamma",
        info="how much more the picture attends to the prompt",
        elem_id="gamma",
    )
    threshold = gr.Slider(
        *(0, MAX_TIMESTEP, taca.threshold),
        step=5,
        label="Threshold",
        info="TACA acts from here on upwards: 1000 is noise, 0 the picture",
        elem_id="threshold",
    )
    schedule = gr.Radio(
        list(get_args(Schedule)), value=taca.schedule, label="Schedule", elem_id="schedule"
    )
    guidance = gr.Slider(
        *(0, 15, own.guidance if config.guidance is None else config.guidance),
        step=0.1,
        label="Guidance",
        elem_id="guidance",
    )
    lora = gr.Dropdown(
        list(offered(config)), value=config.lora or NO_LORA, label="LoRA", elem_id="lora"
    )
    with gr.Accordion("Strength of the LoRA, size of the picture", open=False):
        strength = gr.Slider(
            *(0, 2, 1), step=0.05, label="Strength of the LoRA", elem_id="strength"
        )
        gate = gr.Radio(_GATES, value="", label="The LoRA acts", elem_id="gate")
        with gr.Row():
            width, height = (
                gr.Number(
                    side,
                    label=label,
                    precision=0,
                    minimum=1,
                    maximum=studio.max_side,
                    min_width=100,
                    elem_id=label.lower(),
                )
                for label, side in {"Width": studio.width, "Height": studio.height}.items()
            )
    return [
        *(seed, count, guidance, gamma, threshold, schedule, lora, strength, gate, width, height)
    ]


def _pictures(studio: Studio, drawing: Drawing, step: int, word: str) -> tuple[Any, ...]:
    """The names of both columns, their pictures as a step, counted from 1, predicts them, with a
    word's map if one is chosen, and a line about the step."""
    taca = drawing.settings.taca
    assert taca is not None  # the configuration refuses that
    pictures = studio.predicted(drawing, step - 1)
    time, gamma = drawing.timesteps[step - 1], drawing.gamma(step - 1)
    about = f"**Step {step} of {drawing.steps}**, t = {time:.0f}, gamma {gamma:.3g}"
    if word == _NO_WORD:
        pictures = [enlarged(each) for each in pictures]
        about += f". {describe_steps(taca, drawing.timesteps)}."
    else:
        maps = studio.look(drawing, step - 1, word)
        pictures = heated(pictures, maps)
        shares = " and ".join(f"{100 * each.mean():.2g} %" for each in maps)
        about += (
            f". Brighter places attend more to “{html.escape(word)}”; the mean of all places is "
            f"{shares} of their attention."
        )
    lora = "" if drawing.settings.lora is None else " + LoRA"
    return "**Plain**", f"**TACA, {describe_gamma(taca)}{lora}**", *pictures, about


@contextmanager
def _told() -> Iterator[None]:
    """Shows what the visitor can mend as a message in the page."""
    try:
        yield
    except UserError as error:
        said = html.escape(str(error))
        raise gr.Error(said, duration=20, title="Not drawn", print_exception=False) from None
