from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.inference.engine import Engine
from nanochat.inference.formats import WeightFormat
from nanochat.inference.quantized import (
    GROUP,
    MANY_ROWS,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    W8A8Linear,
    matrix_bytes,
    quantize,
)
from nanochat.inference.sampling import Sampling
from nanochat.model.gpt import GPT, DecodingLinear
from nanochat.recipes import Model
from nanochat.tokenizer import Tokenizer

on_x86 = pytest.mark.skipif(not W8A8Linear.works_here(), reason="PyTorch has no FBGEMM here")
EIGHT_BITS = [WeightFormat.INT8, pytest.param(WeightFormat.W8A8, marks=on_x86)]
SMALL = [*EIGHT_BITS, WeightFormat.INT4]


def matrix(outputs: int = 96, inputs: int = 2 * GROUP) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)) * 0.02


def test_an_int8_entry_is_half_a_step_away_at_most() -> None:
    weight = matrix()
    weight[3] = 0
    made = Int8Linear(weight)
    steps = made.scale_O.float()[:, None]
    # The scale is rounded to bfloat16: the largest entry may lie a little beyond the last step.
    assert torch.all((made.weight - weight).abs() <= 0.5 * steps + 0.004 * weight.abs())
    assert torch.all(made.weight[3] == 0)


def test_an_int4_entry_is_half_a_step_of_its_group_away_at_most() -> None:
    weight = matrix()
    made = Int4Linear(weight)
    groups = weight.view(len(weight), -1, GROUP)
    steps = (groups.amax(dim=-1) - groups.amin(dim=-1)) / 15
    apart = (made.weight - weight).view_as(groups).abs()
    assert torch.all(apart <= 0.5 * steps[..., None] + 0.01 * groups.abs().amax(dim=-1, keepdim=True))


@pytest.mark.parametrize("made", [Int8Linear, pytest.param(W8A8Linear, marks=on_x86), Int4Linear])
@pytest.mark.parametrize("rows", [1, 5, MANY_ROWS + 1])
def test_it_multiplies_as_the_matrix_that_it_stands_for(made: type[QuantizedLinear], rows: int) -> None:
    quantized = made(matrix())
    input = torch.randn(2, rows, quantized.in_features, generator=torch.Generator().manual_seed(2))
    expected = F.linear(input, quantized.weight)
    output = quantized(input)
    assert output.dtype == torch.float32
    # A bfloat16 has eight bits of precision, a rounded row seven, and an output is the sum of 128 products.
    assert (output - expected).abs().max() < 0.02 * expected.abs().max()


@on_x86
def test_an_entry_and_a_rows_number_are_half_a_step_away_at_most() -> None:
    weight = matrix()
    weight[3] = 0
    made = W8A8Linear(weight)
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    assert torch.all((made.weight - weight).abs() <= 0.501 * steps)
    # All of one sign, as behind relu², and of very different sizes; the largest products do not overflow.
    rows = torch.rand(4, made.in_features) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]])
    ones = W8A8Linear(torch.ones(8, made.in_features))
    apart = (ones(rows) - rows.sum(dim=1, keepdim=True)).abs()
    assert torch.all(apart <= made.in_features * 0.51 / 127 * (rows.amax(dim=1) - rows.amin(dim=1))[:, None])
    top = torch.full((2, made.in_features), 5.0)
    top[:, 0] = 0
    torch.testing.assert_close(ones(top), top.sum(dim=1, keepdim=True).expand(2, 8), rtol=1e-5, atol=0)


@on_x86
def test_a_row_in_eight_bits_does_not_depend_on_the_others() -> None:
    made = W8A8Linear(matrix())
    rows = torch.randn(40, made.in_features, generator=torch.Generator().manual_seed(2))
    rows[7] *= 100
    assert torch.equal(made(rows), torch.cat([made(row[None]) for row in rows]))


@pytest.mark.parametrize("format", SMALL)
def test_a_model_says_nearly_the_same_with_less_memory(format: WeightFormat) -> None:
    model = GPT(Model(depth=2, width=GROUP, heads=2, kv_heads=1, context=64), 300)
    model.init_weights(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    fused = copy.deepcopy(model).eval().fuse()
    small = quantize(copy.deepcopy(model).eval().fuse(), format)
    assert not any(isinstance(module, DecodingLinear) for module in small.modules())
    assert matrix_bytes(small) < matrix_bytes(fused) / (5 if format is WeightFormat.INT4 else 3)
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(3))
    apart = (small(ids) - fused(ids)).abs().max() / fused(ids).abs().max()
    assert 0 < apart < (0.4 if format is WeightFormat.INT4 else 0.05)


@pytest.mark.parametrize("format", EIGHT_BITS)
def test_a_trained_model_answers_as_before_in_eight_bits(
    trained_model: GPT, byte_tokenizer: Tokenizer, format: WeightFormat
) -> None:
    from nanochat.data.conversations import Conversation, Message

    model = quantize(copy.deepcopy(trained_model).fuse(), format)
    questions = ("What is your name?", "What is 17+25?")
    prompts = [
        byte_tokenizer.render_prompt(Conversation((Message("user", question),))) for question in questions
    ]
    said = [one.text for one in Engine(model, byte_tokenizer).generate(prompts, Sampling(max_tokens=40))]
    assert said == ["I am NanoChat 😀.", "The answer is 42."]


def test_what_cannot_be_held_so_is_refused_by_name(
    trained_model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(W8A8Linear, "works_here", lambda: False)
    with pytest.raises(ValueError, match=r"w8a8 weights need an x86 processor .* take int8"):
        quantize(copy.deepcopy(trained_model).fuse(), WeightFormat.W8A8)
    with pytest.raises(ValueError, match=f"int4 weights need a width that is a multiple of {GROUP}, not 48"):
        quantize(copy.deepcopy(trained_model).fuse(), WeightFormat.INT4)
    with torch.device("meta"):
        elsewhere = GPT(Model(depth=1, width=GROUP, heads=1, kv_heads=1, context=8), 300)
    with pytest.raises(ValueError, match="int8 weights are for a CPU; on meta the model runs in bfloat16"):
        quantize(elsewhere, WeightFormat.INT8)
