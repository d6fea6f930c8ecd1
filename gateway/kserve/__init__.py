"""The Open Inference Protocol's gRPC service, with Triton's streaming."""
