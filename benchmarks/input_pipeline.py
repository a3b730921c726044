"""Measures whether training waits for its input: from a cache, and while the cache is made.

    python -m benchmarks.input_pipeline [--steps N] [--rounds N] [--json FILE]

The first part writes a cache with FLUX.1's sizes at 1024 px (latents of 128 x 128 x 16 with their
variance, 512 T5 tokens of 4096, in bfloat16: 5.2 MB a sample). It reads the cache as a training run
does, into the device's memory, with a pause of 50 ms for each step. The files are in the system's
file cache, so that the disk is not measured.

The second part encodes JPEGs with an autoencoder and a T5 of the real structure but smaller width,
alternating between the encoders alone and the stage of training that makes a cache. On a CPU the
stage's own work competes with the encoders, so that all of it is measured; with an accelerator it
runs beside them.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from PIL import Image

from taca_jax.autoencoders.vae import AutoencoderKL, VAEConfig
from taca_jax.data.buckets import make_buckets
from taca_jax.data.cache.files import write_sizes
from taca_jax.data.cache.manifest import Manifest
from taca_jax.data.cache.reader import Cache, make_cached_loader
from taca_jax.data.cache.writer import CacheWriter, Caption, write_empty_caption
from taca_jax.data.config import DataConfig
from taca_jax.data.loader import one_bucket
from taca_jax.data.sources.factory import open_source
from taca_jax.text.encoders import T5Text
from taca_jax.text.t5 import T5Config, T5Encoder
from taca_jax.text.tokenizers import load_tokenizer
from taca_jax.training.encoding import Encoders, encode_to
from taca_jax.training.models import InputModels
from taca_jax.training.run import _next_batch

STEP_SECONDS = 0.05
EXAMPLES = 96
RESOLUTION, DOWNSCALE, CHANNELS = 1024, 8, 16
TEXT, POOLED = (512, 4096), (768,)

VAE = VAEConfig((48, 96, 192, 192), 2, 16, 16, 0.36, 0.12)
T5 = T5Config(vocab_size=259, dim=512, ff_dim=1024, num_heads=8, head_dim=64, num_layers=6)
PICTURES, PICTURE_SIDE, ENCODED_SIDE, ENCODE_BATCH = 16, 512, 256, 4


@dataclass(frozen=True)
class Feeding:
    """Milliseconds per step of 50 ms: wall time, waits for input, and processor time."""

    batch: int
    wall_median: float
    wait_median: float
    wait_95: float
    wait_most: float
    late_share: float
    cpu: float


def write_cache(folder: Path) -> Cache:
    """A complete cache of noise, one caption a picture."""
    rng = np.random.default_rng(0)
    manifest = Manifest(
        made_with={},
        files="",
        data={},
        sources=[EXAMPLES],
        dtype="bfloat16",
        latents_dtype="bfloat16",
        channels=CHANNELS,
        downscale=DOWNSCALE,
        moments=True,
        text=list(TEXT),
        pooled=list(POOLED),
        examples=EXAMPLES,
    )
    side = RESOLUTION // DOWNSCALE

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    def caption() -> Caption:
        return {"txt": noise(*TEXT), "pooled": rng.standard_normal(POOLED, np.float32)}

    with CacheWriter(folder, "") as writer:
        for i in range(EXAMPLES):
            latents = [noise(side, side, CHANNELS) for _ in range(2)]
            writer.add(i, f"{i}.jpg", latents, [caption()])
    write_empty_caption(folder, caption())
    write_sizes(folder, [one_bucket(range(EXAMPLES))], EXAMPLES, RESOLUTION)  # pyright: ignore[reportArgumentType]
    manifest.write(folder)
    return Cache(folder, manifest)


def feed(cache: Cache, batch: int, steps: int) -> Feeding:
    """Reads batches for a simulated device that takes STEP_SECONDS for each."""
    data = DataConfig(batch_size=batch, resolution=RESOLUTION)
    walls, waits = [], []
    with make_cached_loader(cache, data=data) as loader:
        for _ in range(5):
            jax.block_until_ready(_next_batch(loader, 1, None)[0])
            time.sleep(STEP_SECONDS)
        cpu = time.process_time()
        for _ in range(steps):
            start = time.perf_counter()
            # As in training, this batch is loaded while the previous step runs.
            jax.block_until_ready(_next_batch(loader, 1, None)[0])
            taken = time.perf_counter() - start
            time.sleep(max(0.0, STEP_SECONDS - taken))
            walls.append(time.perf_counter() - start)
            waits.append(max(0.0, taken - STEP_SECONDS))
        cpu = (time.process_time() - cpu) / steps
    waits_ms = np.array(waits) * 1000
    return Feeding(
        batch=batch,
        wall_median=statistics.median(walls) * 1000,
        wait_median=float(np.median(waits_ms)),
        wait_95=float(np.percentile(waits_ms, 95)),
        wait_most=float(waits_ms.max()),
        late_share=float((waits_ms > 0).mean()),
        cpu=cpu * 1000,
    )


@dataclass(frozen=True)
class Encoding:
    """Pictures per second of the encoders alone and of the stage; medians over rounds.

    ratio, ratios: of the speeds, stage / alone: their median and each round's. cpu_ratio: the
    median of the same ratio in processor time.
    """

    alone: float
    stage: float
    ratio: float
    ratios: list[float]
    cpu_ratio: float


def write_pictures(folder: Path) -> None:
    """JPEGs with some detail, and a caption for each."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        coarse = rng.integers(0, 256, (32, 32, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((PICTURE_SIDE,) * 2, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        (folder / f"{i}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{i}.txt").write_text(f"picture number {i}")


def encode_rounds(folder: Path, rounds: int) -> Encoding:
    """Measures the encoders alone on batches in memory, and the stage from files to files."""
    pictures = folder / "pictures"
    pictures.mkdir()
    write_pictures(pictures)
    data = DataConfig(f"folder:{pictures}", batch_size=ENCODE_BATCH, resolution=ENCODED_SIDE)
    inputs = InputModels(
        T5Text(T5Encoder(T5, rngs=nnx.Rngs(0)), pad_id=0),
        load_tokenizer("bytes", 128),
        AutoencoderKL(VAE, rngs=nnx.Rngs(0)),
    )
    encoders = Encoders(inputs, None, ENCODE_BATCH, "float32")
    source = open_source(data)
    (bucket,) = make_buckets(source, data, multiple=16, least=ENCODE_BATCH)
    buckets = [type(bucket)((ENCODED_SIDE,) * 2, bucket.parts)]
    images = np.stack([source[i]["image"] for i in range(ENCODE_BATCH)])
    tokens = encoders.tokenizer(["a caption"] * ENCODE_BATCH)
    batches = PICTURES // ENCODE_BATCH

    def alone() -> None:
        started = [encoders.start(images, tokens) for _ in range(batches)]
        for encoding in started:
            encoding.get()

    def stage(number: int) -> None:
        with CacheWriter(folder / f"cache{number}", "") as writer:
            encode_to(
                writer,
                *(source, buckets, encoders),
                done=np.zeros(0, np.int64),
                stopping=lambda: False,
            )

    def timed(run: Any, *arguments: Any) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        run(*arguments)
        return time.perf_counter() - wall, time.process_time() - cpu

    encoders.start(images, tokens).get()  # compiles
    pairs = [(timed(alone), timed(stage, number)) for number in range(rounds)]
    ratios = [a[0] / s[0] for a, s in pairs]
    return Encoding(
        alone=PICTURES / statistics.median(a[0] for a, _ in pairs),
        stage=PICTURES / statistics.median(s[0] for _, s in pairs),
        ratio=statistics.median(ratios),
        ratios=ratios,
        cpu_ratio=statistics.median(a[1] / s[1] for a, s in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "cache")
        print(f"cached latents of {RESOLUTION} px, a step of {STEP_SECONDS * 1000:.0f} ms, in ms")
        print(f"{'batch':>6}{'step':>8}{'waited':>8}{'95 %':>8}{'most':>8}{'late':>7}{'CPU':>8}")
        feedings = [feed(cache, batch, options.steps) for batch in (1, 8)]
        for f in feedings:
            print(
                f"{f.batch:6}{f.wall_median:8.1f}{f.wait_median:8.1f}{f.wait_95:8.1f}"
                f"{f.wait_most:8.1f}{f.late_share:7.0%}{f.cpu:8.1f}",
                flush=True,
            )
        encoding = encode_rounds(Path(folder), options.rounds)
    print(
        f"\ncache stage: {encoding.stage:.2f} pictures/s, the encoders alone {encoding.alone:.2f}; "
        f"ratio {encoding.ratio:.2f} (rounds: {', '.join(f'{r:.2f}' for r in encoding.ratios)}), "
        f"in processor time {encoding.cpu_ratio:.2f}"
    )
    if options.json:
        record = {"feeding": [asdict(f) for f in feedings], "encoding": asdict(encoding)}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
