"""Makes the documentation site out of `docs/`, the settings classes, the metrics collectors and the protocol."""
