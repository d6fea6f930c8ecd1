"""The console, in a real browser and at its HTTP paths."""
