import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
