"""Changes fields of a JSON file."""

import json
from pathlib import Path


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), encoding="utf-8")
