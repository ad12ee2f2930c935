"""Turns files and data sets into documents, tokens and packed rows; trains tokenizers; reads conversations."""
