"""A small FLUX and its T5, from scratch on compositional shapes: the base of `shapes_taca`.

First its T5 is taught what belongs together in captions, and then stays as it is. A step takes 0.5
to 0.8 s on two CPU cores; on Linux a quarter of that is saved by

GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=67108864 \\
    MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184

in its environment, which keep memory that would be given back and taken again at every step. The
learning rate is constant until the decline at the end: a run may be stopped earlier, or prolonged,
with other `steps` and resume=true. With 16 text tokens and 100 image tokens, text is about as
outnumbered as in the full-size model (512 and 4096).
"""

from taca_jax import (
    DataConfig,
    EvalConfig,
    FeaturesConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
)
from taca_jax.autoencoders.pixels import PixelsConfig
from taca_jax.families.flux.model import FluxConfig
from taca_jax.text.t5 import T5Config

CATEGORY_WEIGHTS = {
    "color": 1.0,
    "shape": 1.0,
    "texture": 1.5,
    "spatial": 2.0,
    "numeracy": 1.0,
    "complex": 1.5,
}
"""How often each category is drawn: those that are learnt last more often."""

CONFIG = TrainConfig(
    name="shapes_base",
    steps=100_000,
    model=FluxConfig(
        patch_size=4,
        latent_channels=3,
        num_heads=4,
        head_dim=32,
        axes_dim=(8, 12, 12),
        theta=100,  # for 10 rows and columns: slower rotations could not tell them apart
        num_double_blocks=2,
        num_single_blocks=4,
        mlp_ratio=4.0,
        txt_dim=128,
        pooled_dim=128,
        guidance_embed=False,
    ),
    text=TextConfig(
        tokenizer="shapes",
        length=16,
        encoder=T5Config(
            vocab_size=33, dim=128, ff_dim=256, num_heads=4, head_dim=32, num_layers=2
        ),
    ),
    # The data's mean and standard deviation.
    pixels=PixelsConfig(shift_factor=0.58, scaling_factor=1 / 0.36),
    data=DataConfig(
        source=tuple(f"generated:shapes#{category}" for category in CATEGORY_WEIGHTS),
        weights=tuple(CATEGORY_WEIGHTS.values()),
        batch_size=32,
        resolution=40,
        caption_dropout=0.1,
    ),
    features=FeaturesConfig(weight=1.0, object_weight=3.0, blocks=4, text_steps=350),
    optimizer=OptimizerConfig(
        kind="muon",  # reaches the same loss in half of AdamW's steps
        learning_rate=2e-3,
        warmup_steps=100,
        schedule="constant",
        decay_steps=4_000,
        weight_decay=0.05,
        b2=0.99,
        ema_decay=0.999,
    ),
    timestep_sampling="uniform",
    timestep_shift=6.0,  # what belongs together is decided above sigma 0.8
    log_every=20,
    save_every=500,
    sample_every=2_000,
    sample_prompts=(
        "a red circle and a blue square",
        "a green cross above a yellow circle",
        "three cyan triangles",
        "a striped square and a dotted circle",
        "a purple diamond left of a red cross",
        "two blue squares and one green circle",
        "a checkered yellow square right of a striped blue circle",
        "a triangle and a square",
    ),
    evaluate=EvalConfig(prompts=50, guidances=(2.0, 3.0, 4.0, 5.0), batch_size=60),
)
