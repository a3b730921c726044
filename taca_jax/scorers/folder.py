"""What a scorer's folder holds beside its model: the model's tokenizer."""

TOKENIZER = "tokenizer"
"""The folder of the tokenizer's files."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)
"""Each tokenizer has some of these."""
