"""Opens a page to talk to a model. The same as `hf-decoder demo`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
