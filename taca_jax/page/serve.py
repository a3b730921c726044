"""Opens a model and serves the page."""

import importlib.util
import os
import socket
import sys
import threading
from dataclasses import replace
from ipaddress import ip_address

from taca_jax.errors import UserError
from taca_jax.page.config import PageConfig
from taca_jax.page.limits import NO_LORA, Asked, check_folder, settings_of
from taca_jax.page.studio import Studio
from taca_jax.pipelines.checks import check_evaluation
from taca_jax.pipelines.generate import load_pipeline
from taca_jax.text.words import words_of


def need_gradio() -> None:
    """Raises UserError where Gradio is not installed; it is also kept from asking other hosts."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install -e '.[page]'")
    # Read when Gradio is imported; it would report its use, and look for a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


def serve(config: PageConfig) -> None:
    """Serves the page until it is interrupted, and then ends the program.

    Raises UserError for problems that the user can fix.
    """
    need_gradio()
    check_folder(config)
    check_address(config)
    check_evaluation(config)  # before the model loads
    studio = open_studio(config)
    page = start(studio)
    print(f"the page is at {page.local_url}; Ctrl-C ends it", flush=True)
    if not _is_local(config.host):
        print("anyone who reaches this machine can draw: put a password before it", flush=True)
    # Only now: Gradio gives up where its server does not answer at once, as beside a compilation.
    threading.Thread(target=warm_up, args=(studio,), daemon=True).start()
    page.block_thread()
    studio.close()
    sys.stdout.flush()
    os._exit(0)  # a thread may be compiling, which nothing interrupts: Python would wait, or abort


def check_address(config: PageConfig) -> None:
    """Raises UserError where nothing can listen at the configured host and port."""
    try:
        with socket.create_server((config.host, config.port)):
            pass
    except OSError as error:
        raise UserError(
            f"nothing can listen at {config.host}:{config.port} ({error.strerror}); give another "
            "port= or host="
        ) from None


def open_studio(config: PageConfig) -> Studio:
    """The configured model, loaded. Raises UserError as `load_pipeline` does."""
    bare = replace(config, lora=None)  # the studio attaches LoRAs, at strengths that change
    pipeline = load_pipeline(bare, config.mesh, stages=None, samples=1)
    if pipeline.autoencoder_config is None or not pipeline.has_text_encoder:
        raise UserError(
            f"{config.base} lacks its autoencoder or its text encoders; the page needs both"
        )
    studio = Studio(pipeline, config)
    for lora in pipeline.loras:
        print(f"LoRA: {lora.name}", flush=True)
    return studio


def start(studio: Studio):
    """The page, being served in another thread."""
    from gradio.themes import Default
    from starlette.middleware import Middleware

    from taca_jax.page.guard import Guard
    from taca_jax.page.layout import FONT, build, css

    config = studio.config
    page = build(studio)
    page.launch(
        server_name=config.host,
        server_port=config.port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        state_session_capacity=1000,
        app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None},
        theme=Default(primary_hue="orange", neutral_hue="stone", font=FONT),
        css=css(studio),
    )
    return page


def warm_up(studio: Studio) -> None:
    """Compiles what the first picture needs, so that a visitor need not wait for it."""
    config, own = studio.config, studio.pipeline.settings
    assert config.taca is not None  # its class checks that
    asked = Asked(
        prompt=config.prompt,
        seed=config.seed,
        steps=own.steps if config.steps is None else config.steps,
        guidance=own.guidance if config.guidance is None else config.guidance,
        gamma=config.taca.gamma,
        threshold=config.taca.threshold,
        schedule=config.taca.schedule,
        lora=config.lora or NO_LORA,
        lora_strength=1.0,
        lora_gate=None,
        width=studio.width,
        height=studio.height,
    )
    try:
        drawing = studio.draw(settings_of(config, asked, studio.max_side), lambda *_: None)
        studio.predicted(drawing, 0)
        for word in words_of(config.prompt)[:1]:
            studio.look(drawing, 0, word)
    except UserError as error:
        print(f"prompt={config.prompt!r} cannot be drawn: {error}", flush=True)
    else:
        print("compiled: pictures come without delay now", flush=True)


def _is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
