"""Text to tokens to batches: tokenizers, sources, prepared folders, and the order of training data."""
