"""Measures the quantization methods on a model, or saves one. The same as `hf-decoder quantize`."""

import sys

from hf_decoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
