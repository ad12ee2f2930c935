"""Continues a prompt, or chats, with a saved model. The same as `hf-decoder generate`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
