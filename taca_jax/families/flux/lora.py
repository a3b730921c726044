"""LoRA files of FLUX with Black Forest Labs' own names and PEFT's factors, by who writes them."""

from taca_jax.families.flux import bfl as flux_bfl
from taca_jax.formats.lora.alphas import PEFT_PREFIX
from taca_jax.formats.lora.dialect import Dialect

COMFYUI = Dialect("ComfyUI", flux_bfl.TABLE, ("diffusion_model.", flux_bfl.COMFY_PREFIX))
FAL = Dialect("fal", flux_bfl.TABLE, (PEFT_PREFIX,))
FLUX = Dialect("Black Forest Labs", flux_bfl.TABLE, ("",))
