"""Pagewire: LLM serving with paged KV memory over gRPC. What a user imports and types."""
__version__ = "0.1.0"
