"""What visitors of the page may ask for, and what is refused."""

import asyncio
import socket
from dataclasses import replace

import pytest

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import UserError
from taca_jax.page.config import PageConfig
from taca_jax.page.guard import CONTENT, MOST_BYTES, Guard
from taca_jax.page.limits import NO_LORA, Asked, check_folder, offered, settings_of
from taca_jax.page.serve import check_address, need_gradio
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.taca import TacaConfig

MAX_SIDE = 64
ASKED = Asked(
    prompt=" two red circles ",
    seed=7,
    steps=3,
    guidance=2.5,
    gamma=1.3,
    threshold=800,
    schedule="cosine",
    lora=NO_LORA,
    lora_strength=0.5,
    lora_gate=None,
    width=40,
    height=48,
)


def settings(asked: Asked = ASKED, **config) -> GenerateConfig:
    return settings_of(PageConfig(**config), asked, MAX_SIDE)


def test_what_is_asked_for_becomes_the_settings_of_generate():
    made = settings(base="mine", dtype="float32", taca=TacaConfig(cond_only=True))
    assert made == GenerateConfig(
        base="mine",
        dtype="float32",
        prompt="two red circles",
        seed=7,
        steps=3,
        guidance=2.5,
        width=40,
        height=48,
        taca=TacaConfig(gamma=1.3, threshold=800, schedule="cosine", cond_only=True),
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "a" * 1001}, "1001 characters of the prompt; this page takes up to 1000"),
        ({"steps": 51}, "51 steps; this page takes up to 50"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5; give a whole number"),
        ({"seed": None}, "seed is empty; give a number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": float("nan")}, "seed is empty"),
        ({"gamma": 0}, "gamma is 0"),
        ({"threshold": 1001}, "threshold is 1001"),
        ({"guidance": float("inf")}, "guidance is empty"),
        ({"width": 65}, "65 pixels a side; this page takes up to 64"),
        ({"height": 10**9}, "pixels a side"),
        ({"lora_strength": None}, "LoRA strength is empty"),
    ],
)
def test_what_cannot_be_drawn_is_said(changes, said):
    with pytest.raises(UserError, match=said):
        settings(replace(ASKED, **changes))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "loras"
    (folder / "inside").mkdir(parents=True)
    for name in ("b", "a", "a,b", "../secret", "inside/deep"):
        (folder / f"{name}.safetensors").touch()
    (folder / "notes.txt").touch()
    return folder


def test_loras_are_the_configured_one_and_the_files_of_the_folder(folder):
    config = PageConfig(lora="own.safetensors:0.8@taca", lora_folder=str(folder))
    # The name with a comma would be read as two.
    assert list(offered(config)) == [NO_LORA, config.lora, "a.safetensors", "b.safetensors"]
    (folder / "new.safetensors").touch()
    assert "new.safetensors" in offered(config)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "inside/deep.safetensors",
        "notes.txt",
        "/etc/passwd",
        "owner/repo",
        "shapes_taca.safetensors",
        "a,b.safetensors",
        "a.safetensors,b.safetensors",
        "",
    ],
)
def test_no_other_lora_can_be_had(folder, name):
    with pytest.raises(UserError, match="there is no LoRA"):
        settings(replace(ASKED, lora=name), lora_folder=str(folder))


def test_a_lora_has_the_strength_and_the_gate_that_are_asked_for(folder):
    config = {"lora": "own.safetensors@taca:0.8", "lora_folder": str(folder)}
    own = replace(ASKED, lora="own.safetensors@taca:0.8")
    assert settings(own, **config).lora == "own.safetensors@taca:0.4"
    always = replace(own, lora_gate="always")
    assert settings(always, **config).lora == "own.safetensors@always:0.4"
    other = replace(ASKED, lora="b.safetensors", lora_strength=1)
    assert settings(other, **config).lora == f"{folder}/b.safetensors:1"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"taca": None}, "leave taca on"),
        ({"taca": TacaConfig(first_steps=3)}, "leave those out"),
        ({"taca": TacaConfig(knots=(1.1, 1.2))}, "leave those out"),
        ({"port": 70_000}, "port is 70000"),
        ({"queue": 0}, "queue is 0"),
        ({"max_side": 4}, "max_side is 4"),
        ({"steps": 60}, "steps is 60"),
    ],
)
def test_a_page_that_could_not_work_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        PageConfig(**values)


def test_the_folder_of_loras_has_to_be_one(tmp_path):
    check_folder(PageConfig())
    with pytest.raises(UserError, match=r"lora_folder=.*no is no folder"):
        check_folder(PageConfig(lora_folder=str(tmp_path / "no")))


def test_without_a_preset_the_page_draws_shapes():
    def parsed(*argv: str) -> PageConfig:
        return parse_cli(
            *(argv, PageConfig),
            attribute="GENERATE",
            preset_kind=GenerateConfig,
            default="shapes_taca",
        )

    config = parsed()
    assert (config.base, config.lora) == ("shapes_base", "shapes_taca.safetensors")
    assert config.taca == TacaConfig(threshold=835)
    assert (config.host, parsed("host=0.0.0.0").host) == ("127.0.0.1", "0.0.0.0")
    flux = parsed("--config", "flux_taca", "max_side=1024")
    assert (flux.base, flux.max_side, flux.taca) == ("flux1-dev", 1024, TacaConfig())


def answer(method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[bytes, bytes]]:
    """The status and the headers with which a guarded application answers a request."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": encoded}
    asyncio.run(Guard(app)(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def test_large_requests_and_files_are_refused():
    small = {"content-length": str(MOST_BYTES)}
    assert answer("POST", "/gradio_api/queue/join", small)[0] == 200
    large = {"content-length": str(MOST_BYTES + 1)}
    assert answer("POST", "/gradio_api/queue/join", large)[0] == 413
    assert answer("POST", "/gradio_api/queue/join", {})[0] == 411
    assert answer("POST", "/gradio_api/upload", small)[0] == 403


def test_a_browser_is_told_to_ask_no_other_host():
    _, headers = answer("GET", "/", {})
    assert headers[b"content-security-policy"].decode() == CONTENT
    assert "http" not in CONTENT


def test_an_address_in_use_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = PageConfig(port=taken.getsockname()[1])
        with pytest.raises(UserError, match=r"nothing can listen at 127\.0\.0\.1:\d+ \(Address"):
            check_address(config)
    check_address(config)
    with pytest.raises(UserError, match="nothing can listen at not a host"):
        check_address(PageConfig(host="not a host"))


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Gradio: pip install -e '\.\[page\]'"):
        need_gradio()
