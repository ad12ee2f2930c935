"""From files and data sets to documents, tokens and packed rows; tokenizers; rows of conversations."""
