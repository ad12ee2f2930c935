"""Guards against text and code of strangers: terminal output, time and memory limits, processes without secrets."""
