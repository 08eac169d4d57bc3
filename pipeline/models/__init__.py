"""Models that look at images, as plug-ins: scores and embeddings of every downloaded image."""
