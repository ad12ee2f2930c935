"""Prints what a bug report needs: versions, hardware, packages. The same as `hf-decoder env`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["env", *sys.argv[1:]]))
