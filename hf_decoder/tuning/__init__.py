"""Fine-tuning: the rows of each task, losses and measures, cross-validation."""
