"""Everything from raw text to an assistant in one run: rows, stages one after another, and their records."""
