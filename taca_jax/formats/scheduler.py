"""Noise levels from diffusers' scheduler_config.json."""

from taca_jax.formats.settings import Settings
from taca_jax.sampling.schedule import FlowSchedule


def schedule_of(settings: Settings) -> FlowSchedule:
    """The noise levels that diffusers' scheduler_config.json describes.

    Raises UserError for another scheduler and for unsupported options.
    """
    settings.expect("_class_name", "FlowMatchEulerDiscreteScheduler")
    settings.expect("time_shift_type", "exponential")
    settings.expect("num_train_timesteps", 1000)
    for option in (
        "invert_sigmas",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
    ):
        settings.expect(option, False)
    settings.expect("shift_terminal")
    if not settings.get("use_dynamic_shifting", False):
        return settings.build(FlowSchedule, {"shift": settings["shift"]})
    values = {
        "base_shift": settings["base_shift"],
        "max_shift": settings["max_shift"],
        "base_tokens": settings["base_image_seq_len"],
        "max_tokens": settings["max_image_seq_len"],
    }
    return settings.build(FlowSchedule, values)
