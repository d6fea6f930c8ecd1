"""How the language model that ships with Pagewire is made: its text, its tokenizer and its training."""
