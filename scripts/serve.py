"""Serves a saved model to OpenAI clients. The same as `hf-decoder serve`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
