"""What can be wrong with a machine, an installation, a model or a running service, and how to mend each."""
