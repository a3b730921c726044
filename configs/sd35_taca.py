"""TACA on Stable Diffusion 3.5-Medium: trains the LoRA on your pictures, and draws with it.

python -m convert sd3 --src stable-diffusion-3.5-medium --dst sd35-medium
python train.py --config sd35_taca data.source=folder:PICTURES data.batch_size=16
python generate.py --config sd35_taca prompt="a red cube on a blue sphere"   # lora=none: without it
"""

from taca_jax import (
    DataConfig,
    GenerateConfig,
    LoRAConfig,
    OptimizerConfig,
    TacaConfig,
    TrainConfig,
)

TACA = TacaConfig(gamma=1.2, threshold=970)

CONFIG = TrainConfig(
    name="sd35_taca",
    steps=10_000,
    base="sd35-medium",
    lora=LoRAConfig(rank=64, alpha=64),
    taca=TACA,
    data=DataConfig(source="folder:pictures", batch_size=16, resolution=1024, caption_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100, weight_decay=0.01),
    dtype="bfloat16",
    remat="auto",
    timestep_sampling="uniform",
    save_every=500,
)

GENERATE = GenerateConfig(
    base="sd35-medium", lora="runs/sd35_taca/lora.safetensors@taca", taca=TACA
)
