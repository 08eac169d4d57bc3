"""pairmill: pipeline."""
