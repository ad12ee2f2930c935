"""Fine-tunes a saved model. The same as `hf-decoder finetune`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
