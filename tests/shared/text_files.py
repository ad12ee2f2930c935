"""Writes documents as text files and tables."""

import gzip
import json

from datasets import Dataset

DOCUMENTS = ["First line,\r\nsecond.\n", "  Übung: 東京\n", "third"]


def write(folder, name, documents=DOCUMENTS, column="text"):
    path = folder / name
    rows = [{"id": index, column: text} for index, text in enumerate(documents)]
    kind = name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "json":
        data = json.dumps(rows).encode()
    elif kind == "jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif kind in ("parquet", "csv"):
        plain = folder / f"plain.{kind}"
        getattr(Dataset.from_list(rows), f"to_{kind}")(str(plain))
        data = plain.read_bytes()
        plain.unlink()
    else:
        data = "".join(documents).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path
