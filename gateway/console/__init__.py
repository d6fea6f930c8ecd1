"""The console: a page that shows the blocks, the requests and the workers as they are, and a prompt to try."""
