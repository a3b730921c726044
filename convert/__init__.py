"""`python -m convert`: original weights to model folders, LoRA files from one layout to another."""
