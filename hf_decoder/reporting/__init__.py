"""Model cards, and the lines of Python that load a model."""
