"""Measures our model against the stock class. The same as `hf-decoder benchmark`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
