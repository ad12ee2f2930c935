"""What a model costs: presets, parameters, FLOPs, memory, devices."""
