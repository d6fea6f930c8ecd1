"""The OpenAI-compatible HTTP front door: JSON and server-sent events in front of the same RequestPath as gRPC."""
