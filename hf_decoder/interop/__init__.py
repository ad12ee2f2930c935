"""The door between model families: their checkpoints come in, ours leave, tensor by tensor and verified."""
