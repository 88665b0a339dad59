"""From text to symbols: sources, corpora, splits, tokenizers, and prepared corpora on disk."""
