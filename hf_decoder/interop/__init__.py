"""Brings models in and out: other families, GGUF, ONNX, quantization, adapters, serving engines."""
