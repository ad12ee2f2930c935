"""Upload of what was examined, and the proof that it arrived."""
