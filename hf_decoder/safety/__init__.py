"""Guards against strangers' text and code: printable output, limits of time and memory, processes without secrets."""
