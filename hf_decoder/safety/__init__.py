"""Limits on what strangers send: text on terminals, templates that never end, processes without a token."""
