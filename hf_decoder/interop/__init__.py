"""Converts checkpoints between model families, tensor by tensor, and verifies the result."""
