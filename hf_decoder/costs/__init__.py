"""Computes what a model costs (parameters, FLOPs, memory), and lists model presets and devices."""
