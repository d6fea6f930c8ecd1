"""The gateway role of Pagewire."""
