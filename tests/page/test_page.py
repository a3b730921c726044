"""The page on a small model: what it draws and shows, in-process and in a browser."""

import io
import json
import os
import shutil
import socket
import time
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from taca_jax.errors import UserError
from taca_jax.evaluation.attention_maps.config import AttentionConfig
from taca_jax.evaluation.attention_maps.measuring import measure, read_batches
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.page.config import PageConfig
from taca_jax.page.heat import heated
from taca_jax.page.serve import open_studio, start, warm_up
from taca_jax.page.studio import Studio
from taca_jax.pipelines.config import GenerateConfig, Variant
from taca_jax.pipelines.grids import enlarged
from taca_jax.pipelines.lora_choice import LoRAChoice
from taca_jax.sampling.loop import _compiled
from taca_jax.taca import TacaConfig
from taca_jax.weights.lora_files import write_lora
from tests.random_models import randomise
from tests.training.tiny import tiny_pipeline

PROMPT = "two red circles"
STEPS = 3
TACA = TacaConfig(gamma=1.5, threshold=800)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two LoRAs of one rank, of which the page offers one by its folder."""
    folder = tmp_path_factory.mktemp("page")
    tiny_pipeline(steps=STEPS).save(folder / "base")
    (folder / "loras").mkdir()
    for seed, name in enumerate(("own.safetensors", "loras/other.safetensors")):
        model = tiny_pipeline().transformer
        add_lora(model, LoRAConfig(rank=2, alpha=2), ATTENTION_TARGETS, rngs=nnx.Rngs(seed))
        randomise(model, LoRAParam, seed=seed, scale=0.2)
        write_lora(folder / name, model, gate="taca")
    (folder / "loras" / "damaged.safetensors").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return PageConfig(
        base=str(folder / "base"),
        lora=str(folder / "own.safetensors"),
        lora_folder=str(folder / "loras"),
        prompt=PROMPT,
        taca=TACA,
        guidance=2,
        dtype="float32",
        port=_free_port(),
        kept=3,
    )


@pytest.fixture(scope="module")
def studio(config) -> Studio:
    return open_studio(config)


@pytest.fixture(scope="module")
def settings(config) -> GenerateConfig:
    return GenerateConfig(
        base=config.base,
        lora=config.lora,
        dtype="float32",
        prompt=PROMPT,
        seed=5,
        steps=STEPS,
        guidance=2,
        height=40,
        width=40,
        taca=TACA,
    )


@pytest.fixture(scope="module")
def drawing(studio, settings):
    compiled = _compiled()._cache_size()
    drawing = studio.draw(settings, lambda *_: None)
    assert _compiled()._cache_size() == compiled + 1  # for both columns, and for each step
    return drawing


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def test_both_columns_are_what_the_pipeline_draws(studio, settings, drawing):
    for column, taca in zip(drawing.columns, (None, TACA), strict=True):
        out = studio.pipeline(PROMPT, steps=STEPS, seed=5, guidance=2, taca=taca, trajectory=True)
        assert np.array_equal(pixels(column.picture), pixels(out.images[0]))
        assert np.array_equal(column.x0, out.trajectory.x0)
        assert np.array_equal(column.before[1:], out.trajectory.latents[:-1])
    plain, with_taca = (pixels(column.picture) for column in drawing.columns)
    assert (plain != with_taca).any()
    assert np.array_equal(drawing.columns[0].before[0], drawing.columns[1].before[0])


def test_one_program_draws_all_that_is_asked_for(studio, settings, drawing):
    compiled, seen = _compiled()._cache_size(), []
    other = f"{studio.config.lora_folder}/other.safetensors"
    for changes in (
        {"prompt": "a green cross", "seed": 6},
        {"guidance": 3.0},
        {"taca": TacaConfig(gamma=1.1, threshold=500, schedule="cosine")},
        {"lora": f"{settings.lora}@always:0.5"},
        {"lora": None},
        {"lora": other},
    ):
        drawn = studio.draw(replace(settings, **changes), lambda *_: None)
        seen.append(pixels(drawn.columns[1].picture))
        assert (seen[-1] != pixels(drawing.columns[1].picture)).any()
    assert _compiled()._cache_size() == compiled
    plain, gated = (drawn.tolist() for drawn in (seen[4], seen[5]))
    assert plain != gated  # the LoRA of the last drawing acts, the one before it does not


def test_progress_counts_the_steps_of_both_columns(studio, settings):
    told = []
    studio.draw(settings, lambda *now: told.append(now))
    assert told == [(n, 2 * STEPS) for n in (0, 1, 2, 3, 3, 4, 5, 6)]


def test_each_step_shows_what_it_predicts(studio, drawing):
    last = studio.predicted(drawing, STEPS - 1)
    assert last == [column.picture for column in drawing.columns]
    first = studio.predicted(drawing, 0)
    for column, picture in zip(drawing.columns, first, strict=True):
        assert np.array_equal(pixels(picture), pixels(studio.pipeline.decode(column.x0[0])[0]))
        assert (pixels(picture) != pixels(column.picture)).any()


def test_a_words_map_is_that_of_the_analysis_of_attention(studio, settings, drawing):
    analysis = AttentionConfig(
        base=settings.base, prompt=PROMPT, num_images=1, steps=STEPS, guidance=2, seed=5, taca=TACA
    )
    ways = [Variant("plain", None, 1.0), Variant("TACA", TACA, 1.0)]
    studio.draw(settings, lambda *_: None)  # has its LoRA attached
    batches = read_batches(studio.pipeline, analysis, ["circles"])
    expected = [
        measure(
            *(studio.pipeline, analysis, way, batches), are_shapes=False, advance=lambda: None
        ).maps
        for way in ways
    ]
    for step in range(STEPS):
        for found, maps in zip(studio.look(drawing, step, "circles"), expected, strict=True):
            np.testing.assert_allclose(found, maps[step, 0, 1], rtol=1e-5)
    plain, taca = studio.look(drawing, 0, "circles")
    assert plain.shape == (10, 10)
    assert (plain != taca).any()
    with pytest.raises(UserError, match="'square' is not in the prompt"):
        studio.look(drawing, 0, "square")


def test_maps_are_drawn_on_one_scale_over_grey_pictures():
    pictures = [Image.new("RGB", (4, 4), "white")] * 2
    low, high = np.zeros((2, 2)), np.ones((2, 2))
    cold, hot = (pixels(each) for each in heated(pictures, [low, high]))
    assert cold.shape == (512, 512, 3)
    assert len(np.unique(cold.reshape(-1, 3), axis=0)) == 1
    assert hot[0, 0].tolist() == [252, 255, 178]  # 0.85 of the brightest colour over white
    same = heated(pictures, [high, high])  # no span at all
    assert np.array_equal(pixels(same[0]), cold)


def test_files_say_how_each_picture_is_drawn_again(studio, drawing):
    name = studio.keep(drawing)
    for path, column in zip(studio.files(name), drawing.columns, strict=True):
        with Image.open(path) as file:
            assert np.array_equal(pixels(file), pixels(enlarged(column.picture)))
            said = json.loads(file.text["taca_jax"])
        assert (said["prompt"], said["seed"], said["steps"]) == (PROMPT, 5, STEPS)
        assert (said["taca"] is None) == (column.taca is None)
        assert said["lora"] == drawing.settings.lora


def test_old_drawings_are_forgotten_with_their_files(studio, drawing):
    name = studio.keep(drawing)
    files = studio.files(name)
    assert studio.recall(name) is drawing
    for _ in range(studio.config.kept):
        studio.keep(drawing)
    assert not any(file.exists() for file in files)
    with pytest.raises(UserError, match="no longer kept; draw it again"):
        studio.recall(name)


def test_a_damaged_lora_is_refused_and_the_next_drawing_is_right(studio, settings, drawing):
    damaged = LoRAChoice(f"{studio.config.lora_folder}/damaged.safetensors")
    with pytest.raises(UserError, match="damaged"):
        studio.draw(replace(settings, lora=damaged.path), lambda *_: None)
    again = studio.draw(settings, lambda *_: None)
    for before, after in zip(drawing.columns, again.columns, strict=True):
        assert np.array_equal(pixels(before.picture), pixels(after.picture))


def test_compiled_programs_do_not_pile_up(studio, settings, monkeypatch):
    cleared = []
    monkeypatch.setattr("taca_jax.page.studio._MOST_PROGRAMS", 2)
    monkeypatch.setattr("jax.clear_caches", lambda: cleared.append(True))
    studio._programs.clear()
    for program in (1, 2, 1, 2, 3, 3, 1, 2):
        studio._count_program((program,))
    assert len(cleared) == 2  # before 3, and before 2 again
    studio._programs.clear()


def test_warming_up_says_what_is_wrong(studio, monkeypatch, capsys):
    monkeypatch.setattr(studio, "config", replace(studio.config, prompt="an elephant"))
    warm_up(studio)
    said = capsys.readouterr().out
    assert "'an elephant' cannot be drawn: the word 'an' is unknown" in said


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, or whatever is installed under such a name."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium here (Debian's package chromium)")
    options = ["--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture
def served(studio, browser, drawing):
    """A tab that shows the page, and the addresses that it asked for. `drawing` has compiled."""
    page = start(studio)
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(60_000)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.local_url)
    yield tab, asked
    tab.close()
    page.close(verbose=False)


def shown(tab, name: str) -> np.ndarray:
    """The picture that the page shows in a column, in its own size."""
    address = tab.locator(f"#{name} img").get_attribute("src")
    with Image.open(io.BytesIO(tab.request.get(address).body())) as picture:
        return pixels(picture)


def assert_shown(tab, pictures) -> None:
    """Both columns show these pictures, or will in a moment."""
    deadline = time.monotonic() + 20
    for name, picture in zip(("plain", "taca"), pictures, strict=True):
        while not np.array_equal(shown(tab, name), pixels(picture)):
            assert time.monotonic() < deadline, f"{name} shows another picture"
            tab.wait_for_timeout(100)


def test_in_a_browser(served, studio, drawing):
    tab, asked = served
    tab.locator("#prompt textarea").fill(PROMPT)
    tab.locator("#seed input").fill("5")
    tab.locator("#draw").click()
    tab.locator("#taca img").wait_for()
    assert_shown(tab, [enlarged(column.picture) for column in drawing.columns])
    tab.get_by_text("TACA acts on step 1 of 3").wait_for()

    # The slider: back to the first step.
    tab.locator("#step input[type=range]").focus()
    tab.keyboard.press("Home")
    first = studio.predicted(drawing, 0)
    assert_shown(tab, map(enlarged, first))

    # A word: its map over the pictures of this step.
    tab.locator("#word label", has_text="circles").click()
    tab.get_by_text("Brighter places attend more to “circles”").wait_for()
    maps = heated(first, studio.look(drawing, 0, "circles"))
    assert_shown(tab, maps)

    # The file, with its settings.
    with tab.expect_download() as download:
        tab.locator("#save-taca").click()
    assert download.value.suggested_filename == "taca-seed5.png"
    with Image.open(download.value.path()) as file:
        assert json.loads(file.text["taca_jax"])["prompt"] == PROMPT

    # What cannot be drawn is said in the page, and the pictures stay.
    tab.locator("#prompt textarea").fill("a purple elephant")
    tab.locator("#draw").click()
    tab.get_by_text("the word 'elephant' is unknown to this model").wait_for()
    assert_shown(tab, maps)
    assert not tab.locator("#taca .error").is_visible()  # which would cover the picture

    # On a phone nothing stands out to the side.
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= 390
    boxes = [tab.locator(f"#{name} img").bounding_box() for name in ("plain", "taca")]
    assert boxes[0]["y"] == boxes[1]["y"]

    assert asked
    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {tab.url.split("/")[2]}


def test_visitors_get_no_other_files_and_leave_none(served):
    tab, _ = served
    for path in ("/etc/passwd", "pyproject.toml", "../../etc/passwd"):
        answer = tab.request.get(f"{tab.url}gradio_api/file={path}")
        assert answer.status in (403, 404), path
    upload = {"files": {"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"}}
    assert tab.request.post(f"{tab.url}gradio_api/upload", multipart=upload).status == 403
