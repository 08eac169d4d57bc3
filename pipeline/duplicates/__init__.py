"""Pairs that show the same: by bytes, by look, by meaning. Each kind is a step of `pipeline.curation`."""
