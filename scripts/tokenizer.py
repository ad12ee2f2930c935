"""Trains a tokenizer and says how well it fits. The same as `hf-decoder tokenizer`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", *sys.argv[1:]]))
