"""Text to training rows: the tokenizer, prepared folders, and the loaders that read them."""
