"""Original weights to model folders, LoRA files from one layout to another."""
