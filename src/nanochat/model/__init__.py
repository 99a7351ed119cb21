"""The model: architecture, attention, KV cache and loss."""
