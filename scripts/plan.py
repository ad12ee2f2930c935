"""Plans a training on many devices: memory, speed, communication, the command. The same as `hf-decoder plan`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
