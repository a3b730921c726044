"""Encoded examples on disk: latents and text embeddings, in ArrayRecord shards.

A cache is a folder with

- `manifest.json`: with which models and of which data it was made, and if it is complete;
- `empty.bin`: the embeddings of the empty caption, which replaces dropped ones;
- `prompts.safetensors`: those of the prompts of which samples are drawn while training, if any;
- `sizes.npy`: int32 [n, 2], the (height, width) in pixels that each picture was brought to, 0 for
  examples that are left out;
- `shards/NAME/records.array_record`, and `index.npy`, which says where in it each example is.

An example is a record with its latents (mean, then log variance if the autoencoder has one), then a
record for each caption with its embeddings (of the tokens, then pooled). Arrays are stored as they
are in memory. A shard is written whole or not at all: a process that is killed loses what it has
encoded since its last whole shard.
"""
