"""one loss a file, functions of tensors returning (sum, count)."""
