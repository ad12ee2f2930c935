"""Prints what each preset costs to train and to serve. The same as `hf-decoder presets`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["presets", *sys.argv[1:]]))
