"""The files that travel with a checkpoint: flat, self-contained, nothing but torch, transformers and the stdlib."""
