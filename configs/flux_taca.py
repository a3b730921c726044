"""TACA on FLUX.1-dev: trains the LoRA on your pictures, and draws with it.

python -m convert flux --src FLUX.1-dev --dst flux1-dev
python train.py --config flux_taca data.source=folder:PICTURES data.batch_size=16
python train.py --config flux_taca plan=v5e-16 data.batch_size=16      # what that would need
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
    name="flux_taca",
    steps=10_000,
    base="flux1-dev",
    lora=LoRAConfig(rank=64, alpha=64),
    taca=TACA,
    data=DataConfig(source="folder:pictures", batch_size=16, resolution=1024, caption_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100, weight_decay=0.01),
    dtype="bfloat16",
    remat="auto",
    timestep_sampling="uniform",
    guidance=3.5,
    save_every=500,
)

GENERATE = GenerateConfig(base="flux1-dev", lora="runs/flux_taca/lora.safetensors@taca", taca=TACA)
