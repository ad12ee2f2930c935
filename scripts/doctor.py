"""Proves a checkpoint row by row. The same as `hf-decoder doctor`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
