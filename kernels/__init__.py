"""PagedAttention kernels: CUDA source in `csrc/`, a checked wrapper per family, torch twins in `reference/`."""

# transformers probes for a package of this name; this version makes it decide "not installed".
__version__ = "0.0.0"
