"""Trains a language model from raw text; without arguments, the whole job. The same as `hf-decoder pretrain`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
