"""The scheduler role of Pagewire."""
