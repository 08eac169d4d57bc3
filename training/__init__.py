"""pairmill: training."""
