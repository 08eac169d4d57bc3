"""Images of evaluation sets in a dataset: found by perceptual hash or embedding, and left out of it."""
