"""What a model costs: parameters, FLOPs, bytes. Pure arithmetic on a recipe, no tensors.

The model's own cost methods call these, and a test counts real tensors against them.
"""

from __future__ import annotations

from nanochat.recipes import Model, parameters

BYTES_FLOAT32 = 4
BYTES_BFLOAT16 = 2
# Logits that `nanochat.model.loss` makes at once: about 4 MB on a CPU (its cache), 1 GB on a GPU
# (enough work for every kernel).
LOSS_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 28, "mps": 1 << 24}

# A Python process that has loaded torch and this package, before it has a model (torch 2.15, Linux).
PROCESS_BYTES = 600_000_000


def matmul_parameters(model: Model, vocab_size: int) -> int:
    """Parameters that take part in a matrix product: all but the embedding, which is a look-up."""
    return parameters(model, vocab_size) - vocab_size * model.width


def flops_per_token(model: Model, vocab_size: int) -> int:
    """Training FLOPs of one token at full context: 6 a matmul parameter and 12·depth·width·context
    for attention (Kaplan et al. 2020, arXiv:2001.08361, appendix B; Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B; causality is not discounted)."""
    return 6 * matmul_parameters(model, vocab_size) + 12 * model.depth * model.width * model.context


def kv_bytes_per_token(model: Model, bytes_per_value: int = BYTES_BFLOAT16) -> int:
    """Bytes of one cached position: a key and a value for every KV head of every layer."""
    return 2 * model.depth * model.kv_heads * model.head_dim * bytes_per_value


def training_memory_bytes(model: Model, vocab_size: int, device_batch_rows: int) -> int:
    """Rough peak memory of one training process on a GPU.

    fp32 weights, gradients, and optimizer state: one buffer for Muon's matrices, two for AdamW's
    tables. Activations in bf16 with nothing recomputed: about 34 width-sized values a token and
    layer (Korthikanti et al. 2022, arXiv:2205.05198, with the 4x MLP and without dropout), halved
    by fused attention. The loss: of a chunk's logits two fp32 buffers and one in bf16, the head in
    bf16, and its gradient in fp32 and, a chunk's, in bf16.
    """
    total = parameters(model, vocab_size)
    tables = 2 * vocab_size * model.width
    weights = BYTES_FLOAT32 * (2 * total + (total - tables) + 2 * tables)
    tokens = device_batch_rows * model.context
    activations = tokens * model.width * (17 * model.depth + 4) * BYTES_BFLOAT16
    logits = min(LOSS_CHUNK_LOGITS["cuda"], tokens * vocab_size)
    loss = logits * (2 * BYTES_FLOAT32 + BYTES_BFLOAT16)
    loss += vocab_size * model.width * (BYTES_FLOAT32 + 2 * BYTES_BFLOAT16)
    return PROCESS_BYTES + weights + activations + loss


def checkpoint_bytes(model: Model, vocab_size: int) -> int:
    """Bytes of a resumable checkpoint: fp32 weights and optimizer state."""
    total = parameters(model, vocab_size)
    tables = 2 * vocab_size * model.width
    return BYTES_FLOAT32 * (total + (total - tables) + 2 * tables)
