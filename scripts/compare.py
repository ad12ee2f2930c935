"""Compares two models by blind judgments. The same as `hf-decoder compare`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
