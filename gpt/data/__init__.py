"""From a text to batches: corpora, tokenizers, token files."""
