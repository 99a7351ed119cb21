"""Matrices in eight or four bits an entry, for a CPU: less memory to read is less time for a token.

PyTorch's own operators multiply them (`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`): what
torchao has for a CPU is faster than fp32 only where a graph of the model is compiled. Their
fast paths take bfloat16, so that is what a matrix's input is rounded to; between the matrices the model
stays in its own dtype. The embedding is only looked up, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.inference.formats import WeightFormat
from nanochat.model.gpt import GPT, DecodingLinear

# Entries of a row that share a scale and a zero, in four bits.
GROUP = 64
# Rows of a matrix that its operator packs together.
_ROWS_PACKED = 16
# More rows multiply faster with the floats that an int8 matrix stands for.
MANY_ROWS = 64


class QuantizedLinear(nn.Module):
    """A matrix without bias, outputs x inputs. `weight` is what its numbers stand for, in fp32."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs

    @property
    def weight(self) -> Tensor:
        raise NotImplementedError

    def multiply(self, rows_RI: Tensor) -> Tensor:
        """bfloat16 with bfloat16."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        rows_RO = self.multiply(input.reshape(-1, self.in_features).bfloat16())
        return rows_RO.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """Each row of the matrix has one scale: its largest entry is 127 steps from zero."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__(weight_OI.shape[1], weight_OI.shape[0])
        weight_OI = weight_OI.detach().float()
        # As bfloat16 has it, so that what is rounded to is what is multiplied with.
        scale_O = (weight_OI.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
        entries_OI = (weight_OI / scale_O.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
        self.register_buffer("entries_OI", entries_OI, persistent=False)
        self.register_buffer("scale_O", scale_O, persistent=False)
        self.entries_OI: Tensor
        self.scale_O: Tensor

    @property
    def weight(self) -> Tensor:
        return torch.mul(self.entries_OI, self.scale_O.float()[:, None])

    def multiply(self, rows_RI: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(rows_RI, self.entries_OI, self.scale_O)

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() > MANY_ROWS * self.in_features:
            return F.linear(input, self.weight.to(input.dtype))
        return super().forward(input)


class Int4Linear(QuantizedLinear):
    """`GROUP` entries of a row share a scale and a zero: 15 steps from the least of them to the largest."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__(weight_OI.shape[1], weight_OI.shape[0])
        inputs = self.in_features
        weight_OI = F.pad(weight_OI.detach().float(), (0, 0, 0, -self.out_features % _ROWS_PACKED))
        outputs = weight_OI.shape[0]
        groups_OGE = weight_OI.view(outputs, inputs // GROUP, GROUP)
        least_OG, most_OG = groups_OGE.amin(dim=-1), groups_OGE.amax(dim=-1)
        scale_OG = ((most_OG - least_OG) / 15).clamp(min=1e-12).bfloat16().float()
        # What the middle of the steps, number 8, stands for.
        zero_OG = (least_OG + 8 * scale_OG).bfloat16().float()
        steps_OGE = ((groups_OGE - zero_OG[..., None]) / scale_OG[..., None] + 8).round().clamp(0, 15)
        steps_OI = steps_OGE.to(torch.int32).view(outputs, inputs)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps_OI, 1)
        scales_GO2 = torch.stack((scale_OG, zero_OG), dim=-1).transpose(0, 1).contiguous().bfloat16()
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales_GO2", scales_GO2, persistent=False)
        self.packed: Tensor
        self.scales_GO2: Tensor

    @property
    def weight(self) -> Tensor:
        # The packing is the operator's own affair, so it is asked.
        unit_II = torch.eye(self.in_features, dtype=torch.bfloat16)
        return self.multiply(unit_II).t().float().contiguous()

    def multiply(self, rows_RI: Tensor) -> Tensor:
        rows_RO = torch.ops.aten._weight_int4pack_mm_for_cpu(rows_RI, self.packed, GROUP, self.scales_GO2)
        return rows_RO[:, : self.out_features]


def quantize(model: GPT, format: WeightFormat) -> GPT:
    """Hold the matrices of a fused model on a CPU in `format`. Returns the model itself.

    Raises ValueError for a model that is not on a CPU, and for a width that four bits do not divide.
    """
    if format is WeightFormat.FLOAT:
        return model
    if model.device.type != "cpu":
        raise ValueError(f"{format} weights are for a CPU; on {model.device} the model runs in bfloat16")
    if format is WeightFormat.INT4 and model.config.width % GROUP:
        raise ValueError(f"int4 weights need a width that is a multiple of {GROUP}, not {model.config.width}")
    made: Callable[[Tensor], QuantizedLinear] = Int8Linear if format is WeightFormat.INT8 else Int4Linear
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DecodingLinear):
                setattr(module, name, made(child.weight))
    return model


def matrix_bytes(model: GPT) -> int:
    """What a token reads of the model's matrices."""
    return sum(
        tensor.nbytes
        for module in model.modules()
        if isinstance(module, DecodingLinear | QuantizedLinear)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )
