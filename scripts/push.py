"""Checks, uploads and downloads a model. The same as `hf-decoder push`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
