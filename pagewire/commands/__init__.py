"""The commands of `pagewire`, one module each; a module is imported only when its command runs."""
