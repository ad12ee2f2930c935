"""The model card, and what a finished run says."""
