"""Brings other families' checkpoints in, and ours out. The same as `hf-decoder convert`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
