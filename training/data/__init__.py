"""From shards to batches: order, loader, tokenizer, and transforms that run on the device."""
