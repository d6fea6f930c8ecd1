"""The worker role of Pagewire."""
