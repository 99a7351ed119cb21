"""The model: the October 2025 nanochat architecture, top to bottom.

A decoder-only transformer with rotary positions, QK-norm, RMSNorm without weights (also after the
embedding and before the head), ReLU² MLPs, an untied head, softcapped logits, no biases, and
optional grouped KV heads. In fp32 it computes what `transformers`' NanoChat computes: the norm's
epsilon is that of float32, RoPE tables are fp32, and queries and keys are normed after rotation.

Shape letters: B batch, T tokens, D width, H query heads, G KV heads, K head dimension, F MLP
width (4D), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import costs
from nanochat.model.attention import attend
from nanochat.model.kv_cache import KVCache, Write
from nanochat.model.loss import cross_entropy_sum, softcap
from nanochat.recipes import Model

NORM_EPS = torch.finfo(torch.float32).eps

# A model whose matrices take up to so much keeps a second copy of them, for single rows on a CPU.
SINGLE_ROW_COPY_BYTES = 64 * 2**20


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights (Zhang & Sennrich 2019, arXiv:1910.07467).

    The epsilon is float32's in every dtype; left to torch it would be the input's own, which for
    bfloat16 is 0.008.
    """
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


def rotate(x_BHTK: Tensor, cos_BTK2: Tensor, sin_BTK2: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves convention, by -angle.

    The tables are fp32 and so is the product: in bfloat16 the angle of a late position would be off.
    """
    half = x_BHTK.shape[-1] // 2
    cos, sin = cos_BTK2[:, None], sin_BTK2[:, None]
    x1, x2 = x_BHTK[..., :half].float(), x_BHTK[..., half:].float()
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x_BHTK.dtype)


def rotate_wide(x_BHTK: Tensor, cos_B1TK: Tensor, sin_B1TK: Tensor) -> Tensor:
    """`rotate` in a third of the operations, with tables from `widen`."""
    x = x_BHTK.float()
    half = x.shape[-1] // 2
    return (x * cos_B1TK).addcmul_(x.roll(half, dims=-1), sin_B1TK).to(x_BHTK.dtype)


def widen(cos_BTK2: Tensor, sin_BTK2: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for both halves of a head, with the sign of the second in the sine."""
    cos, sin = torch.cat((cos_BTK2, cos_BTK2), dim=-1), torch.cat((sin_BTK2, -sin_BTK2), dim=-1)
    return cos[:, None], sin[:, None]


class Linear(nn.Linear):
    """A matrix without bias, kept in its own dtype and multiplied in that of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class DecodingLinear(Linear):
    """A Linear for inference, which multiplies few rows in the way that is fastest on a CPU.

    Measured with MKL on an AVX2 processor, one thread: 2 to 32 rows took W·xᵀ 0.4 to 0.7 of the time of
    x·Wᵀ (4 rows times 65,536 x 768: 24 ms against 57), and one row took a transposed copy of the
    matrix 0.5 to 0.7 of it.
    """

    MAX_ROWS = 32
    transposed: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, single_row_copy: bool) -> DecodingLinear:
        """single_row_copy: keep a transposed copy of `weight` for single rows."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0])
        made.weight = nn.Parameter(weight.detach(), requires_grad=False)
        copy = made.weight.data.t().contiguous() if single_row_copy else None
        made.register_buffer("transposed", copy, persistent=False)
        return made

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(input)
        rows_RI = input.reshape(-1, input.shape[-1])
        rows = rows_RI.shape[0]
        if rows == 1 and self.transposed is not None:
            return (rows_RI @ self.transposed).view(*input.shape[:-1], -1)
        if 1 < rows <= self.MAX_ROWS:
            return (self.weight @ rows_RI.t()).t().reshape(*input.shape[:-1], -1)
        return super().forward(input)


class Attention(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.c_q = Linear(config.width, config.heads * config.head_dim)
        self.c_k = Linear(config.width, config.kv_heads * config.head_dim)
        self.c_v = Linear(config.width, config.kv_heads * config.head_dim)
        self.c_proj = Linear(config.width, config.width)
        self.c_qkv: DecodingLinear | None = None  # all three, once fused

    def fuse(self, single_row_copy: bool) -> None:
        """Replace the three input matrices by one; see `GPT.fuse`."""
        weight = torch.cat((self.c_q.weight, self.c_k.weight, self.c_v.weight))
        del self.c_q, self.c_k, self.c_v
        self.c_qkv = DecodingLinear.of(weight, single_row_copy)
        self.c_proj = DecodingLinear.of(self.c_proj.weight, single_row_copy)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cached: CachedLayer | None) -> Tensor:
        B, T, D = x_BTD.shape
        if self.c_qkv is not None:
            all_BNTK = self.c_qkv(x_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)
            turned_BNTK = norm(rotate_wide(all_BNTK[:, : self.heads + self.kv_heads], *rope))
            q_BHTK, k_BGTK = turned_BNTK[:, : self.heads], turned_BNTK[:, self.heads :]
            v_BGTK = all_BNTK[:, self.heads + self.kv_heads :]
        else:
            q_BHTK = self.c_q(x_BTD).view(B, T, self.heads, self.head_dim).transpose(1, 2)
            k_BGTK = self.c_k(x_BTD).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
            v_BGTK = self.c_v(x_BTD).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
            q_BHTK, k_BGTK = norm(rotate(q_BHTK, *rope)), norm(rotate(k_BGTK, *rope))
        y_BHTK = attend(q_BHTK, k_BGTK, v_BGTK) if cached is None else cached.attend(q_BHTK, k_BGTK, v_BGTK)
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, 4 * config.width)
        self.c_proj = Linear(4 * config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x_BTD)).square())


class Block(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cached: CachedLayer | None = None
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(norm(x_BTD), rope, cached)
        return x_BTD + self.mlp(norm(x_BTD))


class CachedLayer:
    """One layer's view of a KV cache during one forward pass."""

    def __init__(self, write: Write, layer: int) -> None:
        self.write, self.layer = write, layer

    def attend(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        k_BGSK, v_BGSK = self.write(self.layer, k_BGTK, v_BGTK)
        return attend(q_BHTK, k_BGSK.to(q_BHTK.dtype), v_BGSK.to(q_BHTK.dtype), self.write.mask_BTS)


class GPT(nn.Module):
    """A language model over `vocab_size` ids.

    Weights are fp32 unless the module is cast. `compute_dtype` is the dtype of activations and
    matrix products (None: that of the weights); norms and the loss reduce in fp32 whatever it is.
    """

    def __init__(self, config: Model, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.compute_dtype: torch.dtype | None = None
        self.fused = False
        # The block's forward for training steps, where the runtime has compiled one. Evaluation and
        # decoding stay eager: their shapes vary, and each would be compiled anew.
        self.training_block: Callable[..., Tensor] | None = None
        self.wte = nn.Embedding(vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.lm_head = Linear(config.width, vocab_size)
        self.cos_TK2, self.sin_TK2 = rope_tables(config.context, config.head_dim, config.rope_theta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """Move the RoPE tables with the weights, but never cast them."""
        super()._apply(fn, recurse)
        self.cos_TK2, self.sin_TK2 = self.cos_TK2.to(self.device), self.sin_TK2.to(self.device)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every tensor (nanochat, October 2025). Drawn on the CPU, so that a seed means one model.

        Embedding: normal, std 1. Head and both output projections: zero, so that every block starts
        as the identity and the first prediction is uniform. Other matrices: normal with std
        1/√fan_in · min(1, √(fan_out/fan_in)), the spectral condition of Yang et al. 2023,
        arXiv:2310.17813.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(weight: Tensor, std: float) -> None:
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

        def draw_matrix(matrix: Linear) -> None:
            fan_out, fan_in = matrix.weight.shape
            draw(matrix.weight, fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))

        draw(self.wte.weight, 1.0)
        for block in self.blocks:
            assert isinstance(block, Block)
            draw_matrix(block.attn.c_q)
            draw_matrix(block.attn.c_k)
            draw_matrix(block.attn.c_v)
            block.attn.c_proj.weight.zero_()
            draw_matrix(block.mlp.c_fc)
            block.mlp.c_proj.weight.zero_()
        self.lm_head.weight.zero_()

    @torch.no_grad()
    def fuse(self) -> GPT:
        """Lay the weights out for inference, queries, keys and values as one matrix. Returns itself.

        The outputs stay the same, up to rounding. The model can no longer be trained, and its weights no
        longer have the names under which checkpoints know them.
        """
        matrices = sum(parameter.nbytes for parameter in self.parameters()) - self.wte.weight.nbytes
        single_row_copy = self.device.type == "cpu" and matrices <= SINGLE_ROW_COPY_BYTES
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.fuse(single_row_copy)
            block.mlp.c_fc = DecodingLinear.of(block.mlp.c_fc.weight, single_row_copy)
            block.mlp.c_proj = DecodingLinear.of(block.mlp.c_proj.weight, single_row_copy)
        self.lm_head = DecodingLinear.of(self.lm_head.weight, single_row_copy)
        self.fused = True
        return self

    # ----------------------------------------------------------------------------------------------
    # Forward

    def hidden(self, ids_BT: Tensor, kv_cache: KVCache | None = None) -> Tensor:
        """The normed last layer, BTD, that the head reads. With a cache it is written, not advanced.

        Raises ValueError when the tokens go past the model's context (or the cache's capacity).
        """
        tokens, context = ids_BT.shape[1], self.config.context
        cached: list[CachedLayer | None] = [None] * self.config.depth
        if kv_cache is None:
            if tokens > context:
                raise ValueError(f"{tokens} tokens are more than the model's context of {context}")
            rope = self.cos_TK2[None, :tokens], self.sin_TK2[None, :tokens]
        else:
            write = kv_cache.begin(tokens)
            if kv_cache.longest + tokens > context:
                raise ValueError(
                    f"{kv_cache.longest} tokens in the cache and {tokens} more are past the model's context "
                    f"of {context}"
                )
            rope = self.cos_TK2[write.positions_BT], self.sin_TK2[write.positions_BT]
            cached = [CachedLayer(write, layer) for layer in range(len(cached))]
        if self.fused:
            rope = widen(*rope)
        x_BTD = F.embedding(ids_BT, self.wte.weight)
        x_BTD = norm(x_BTD if self.compute_dtype is None else x_BTD.to(self.compute_dtype))
        learning = self.training and torch.is_grad_enabled() and kv_cache is None
        compiled = self.training_block if learning else None
        for block, layer in zip(self.blocks, cached, strict=True):
            x_BTD = compiled(block, x_BTD, rope) if compiled else block(x_BTD, rope, layer)
        return norm(x_BTD)

    def forward(
        self,
        ids_BT: Tensor,
        kv_cache: KVCache | None = None,
        last_only: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Softcapped logits in fp32, BTV (B1V with `last_only`).

        kv_cache: what came before; it is advanced by what is read. lengths: how many ids of each
        row are real where shorter rows are padded on the right (0: none); `last_only` then means the
        last real one.
        """
        x_BTD = self.hidden(ids_BT, kv_cache)
        if last_only and x_BTD.shape[1] > 1:
            if lengths is None:
                x_BTD = x_BTD[:, -1:]
            else:
                last_B = torch.tensor(lengths, device=x_BTD.device) - 1
                x_BTD = x_BTD[torch.arange(len(lengths), device=x_BTD.device), last_B][:, None]
        if kv_cache is not None:
            kv_cache.advance(ids_BT.shape[1], lengths)
        return softcap(self.lm_head(x_BTD).float(), self.config.logit_softcap)

    def loss_sum(self, ids_BT: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
        """Sum of weight · nats over the targets, an fp32 scalar. A weight of 0 leaves a target out."""
        x_BTD = self.hidden(ids_BT)
        return cross_entropy_sum(
            x_BTD.flatten(0, 1),
            self.lm_head.weight,
            targets_BT.flatten(),
            weights_BT.flatten(),
            self.config.logit_softcap,
        )

    # ----------------------------------------------------------------------------------------------
    # Costs

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations, and so of a KV cache."""
        return self.compute_dtype or self.wte.weight.dtype

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Forward and backward FLOPs of one training token at full context."""
        return costs.flops_per_token(self.config, self.vocab_size)

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of KV cache that one token of one row takes."""
        return costs.kv_bytes_per_token(self.config, dtype.itemsize)


def rope_tables(context: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, fp32, T x K/2."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / theta ** (channels / head_dim)
    angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()
