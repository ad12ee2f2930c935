"""Cross-validates a classifier from scratch. The same as `hf-decoder crossvalidate`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["crossvalidate", *sys.argv[1:]]))
