"""What people see and type in a terminal: the live view and the chat."""
