"""Weights in and out, under the names that other libraries give them."""
