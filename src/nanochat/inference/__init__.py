"""Inference: batched generation with a KV cache, sampling, the calculator, and a chat."""
