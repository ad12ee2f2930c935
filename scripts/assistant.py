"""Runs every stage from raw text to an assistant. The same as `hf-decoder assistant`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["assistant", *sys.argv[1:]]))
