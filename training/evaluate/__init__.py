"""What a trained model can do: zero-shot classification and retrieval, beside chance and a pixel baseline."""
