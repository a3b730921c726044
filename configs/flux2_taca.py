"""TACA on FLUX.2 [klein] base 4B: trains the LoRA on your pictures, and draws with it.

python -m convert flux2 --src black-forest-labs/FLUX.2-klein-base-4B --dst flux2-klein-base-4b
python train.py --config flux2_taca data.source=folder:PICTURES
python generate.py --config flux2_taca prompt="a red cube on a blue sphere"   # lora=none: without

Gamma and threshold are FLUX.1's: they are not from the paper, which did not try FLUX.2.
`python -m taca_jax.evaluation compbench sweep --config flux2_taca lora=none ...` finds better ones.
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
    name="flux2_taca",
    steps=10_000,
    base="flux2-klein-base-4b",
    lora=LoRAConfig(rank=32, alpha=32),
    taca=TACA,
    data=DataConfig(source="folder:pictures", batch_size=1, resolution=1024, caption_dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=100, weight_decay=0.01),
    dtype="bfloat16",
    remat="auto",
    timestep_sampling="uniform",
    save_every=500,
)

GENERATE = GenerateConfig(
    base="flux2-klein-base-4b", lora="runs/flux2_taca/lora.safetensors@taca", taca=TACA
)
