"""Models behind paged attention: the Llama family of our own, every other decoder through transformers."""
