"""Matrices in eight or four bits an entry, for a CPU: less memory to read is less time for a token.

PyTorch's own operators multiply them: what torchao has for a CPU is faster than fp32 only where a graph of
the model is compiled. The fast paths of `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu` take
bfloat16, so that is what a matrix's input is rounded to; between the matrices the model stays in its own
dtype. Rows of small whole numbers are FBGEMM's affair, which only x86 has. The embedding is only looked up,
and stays as it is.
"""

from __future__ import annotations

import warnings
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
# The largest of a row's whole numbers. Without VNNI, processors add two products in 16 bits: 2 * 127 * 127
# fits, and a byte's 255 does not.
_LARGEST = 127
_MULTIPLY = "linear_with_input_q_dq_qweight_dq_output_fp32"


class QuantizedLinear(nn.Module):
    """A matrix without bias, outputs x inputs. `weight` is what its numbers stand for, in fp32."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs

    @property
    def weight(self) -> Tensor:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.buffers(recurse=False))

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


class W8A8Linear(QuantizedLinear):
    """Like `Int8Linear`, and each row of the input is rounded to 128 steps from its least entry to its
    largest. Whole numbers are added exactly, so no row of the result depends on its neighbours."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__(weight_OI.shape[1], weight_OI.shape[0])
        weight_OI = weight_OI.detach().float()
        scale_O = (weight_OI.abs().amax(dim=1) / 127).clamp(min=1e-12)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():
                # A later PyTorch will not have them (its issue 184982): then `quantize` says so.
                warnings.filterwarnings("ignore", ".*quantized tensor creation functions", UserWarning)
                entries_OI = torch.quantize_per_channel(
                    weight_OI,
                    scale_O.double(),
                    torch.zeros(self.out_features, dtype=torch.int64),
                    0,
                    torch.qint8,
                )
            self.packed = torch.ops.quantized.linear_prepack(entries_OI, None)
        finally:
            torch.backends.quantized.engine = engine
        # What a row of ones gives.
        self.register_buffer("sums_O", entries_OI.dequantize().sum(dim=1), persistent=False)
        self.sums_O: Tensor

    @staticmethod
    def works_here() -> bool:
        there = hasattr(torch, "quantize_per_channel") and hasattr(torch.ops.quantized, _MULTIPLY)
        return there and "fbgemm" in torch.backends.quantized.supported_engines

    @property
    def weight(self) -> Tensor:
        entries_OI: Tensor = torch.ops.quantized.linear_unpack(self.packed)[0]
        return entries_OI.dequantize()

    @property
    def nbytes(self) -> int:
        scales = 4 * self.out_features
        return super().nbytes + self.in_features * self.out_features + scales

    def forward(self, input: Tensor) -> Tensor:
        rows_RI = input.reshape(-1, self.in_features).float()
        # Two passes take a third of the time of aminmax.
        least_R1 = rows_RI.amin(dim=1, keepdim=True)
        range_R1 = (rows_RI.amax(dim=1, keepdim=True) - least_R1).clamp_(min=1e-12)
        unit_RI = (rows_RI - least_R1).div_(range_R1)
        rows_RO = getattr(torch.ops.quantized, _MULTIPLY)(unit_RI, 1 / _LARGEST, 0, self.packed)
        rows_RO = torch.addcmul(rows_RO.mul_(range_R1), least_R1, self.sums_O)
        return rows_RO.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


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


_MADE: dict[WeightFormat, Callable[[Tensor], QuantizedLinear]] = {
    WeightFormat.INT8: Int8Linear,
    WeightFormat.W8A8: W8A8Linear,
    WeightFormat.INT4: Int4Linear,
}


def quantize(model: GPT, format: WeightFormat) -> GPT:
    """Hold the matrices of a fused model on a CPU in `format`. Returns the model itself.

    Raises ValueError for a model that is not on a CPU, for a width that four bits do not divide, and for
    W8A8 where PyTorch cannot multiply so.
    """
    if format is WeightFormat.FLOAT:
        return model
    if model.device.type != "cpu":
        raise ValueError(f"{format} weights are for a CPU; on {model.device} the model runs in bfloat16")
    if format is WeightFormat.INT4 and model.config.width % GROUP:
        raise ValueError(f"int4 weights need a width that is a multiple of {GROUP}, not {model.config.width}")
    if format is WeightFormat.W8A8 and not W8A8Linear.works_here():
        raise ValueError("w8a8 weights need an x86 processor and a PyTorch with FBGEMM: take int8")
    made = _MADE[format]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DecodingLinear):
                setattr(module, name, made(child.weight))
    return model


def matrix_bytes(model: GPT) -> int:
    """What a token reads of the model's matrices."""
    return sum(
        module.nbytes if isinstance(module, QuantizedLinear) else module.weight.nbytes
        for module in model.modules()
        if isinstance(module, DecodingLinear | QuantizedLinear)
    )
