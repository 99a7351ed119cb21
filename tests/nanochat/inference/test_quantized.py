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
    matrix_bytes,
    quantize,
)
from nanochat.inference.sampling import Sampling
from nanochat.model.gpt import GPT, DecodingLinear
from nanochat.recipes import Model
from nanochat.tokenizer import Tokenizer

SMALL = [WeightFormat.INT8, WeightFormat.INT4]


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


@pytest.mark.parametrize("made", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [1, 5, MANY_ROWS + 1])
def test_it_multiplies_as_the_matrix_that_it_stands_for(made: type[QuantizedLinear], rows: int) -> None:
    quantized = made(matrix())
    input = torch.randn(2, rows, quantized.in_features, generator=torch.Generator().manual_seed(2))
    expected = F.linear(input, quantized.weight)
    output = quantized(input)
    assert output.dtype == torch.float32
    # A bfloat16 has eight bits of precision, and an output is the sum of 128 products.
    assert (output - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("format", SMALL)
def test_a_model_says_nearly_the_same_with_less_memory(format: WeightFormat) -> None:
    model = GPT(Model(depth=2, width=GROUP, heads=2, kv_heads=1, context=64), 300)
    model.init_weights(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    fused = copy.deepcopy(model).eval().fuse()
    small = quantize(copy.deepcopy(model).eval().fuse(), format)
    assert not any(isinstance(module, DecodingLinear) for module in small.modules())
    assert matrix_bytes(small) < matrix_bytes(fused) / (3 if format is WeightFormat.INT8 else 5)
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(3))
    apart = (small(ids) - fused(ids)).abs().max() / fused(ids).abs().max()
    assert 0 < apart < (0.05 if format is WeightFormat.INT8 else 0.4)


def test_a_trained_model_answers_as_before_in_eight_bits(
    trained_model: GPT, byte_tokenizer: Tokenizer
) -> None:
    from nanochat.data.conversations import Conversation, Message

    model = quantize(copy.deepcopy(trained_model).fuse(), WeightFormat.INT8)
    questions = ("What is your name?", "What is 17+25?")
    prompts = [
        byte_tokenizer.render_prompt(Conversation((Message("user", question),))) for question in questions
    ]
    said = [one.text for one in Engine(model, byte_tokenizer).generate(prompts, Sampling(max_tokens=40))]
    assert said == ["I am NanoChat 😀.", "The answer is 42."]


def test_what_cannot_be_held_so_is_refused_by_name(trained_model: GPT) -> None:
    with pytest.raises(ValueError, match=f"int4 weights need a width that is a multiple of {GROUP}, not 48"):
        quantize(copy.deepcopy(trained_model).fuse(), WeightFormat.INT4)
    with torch.device("meta"):
        elsewhere = GPT(Model(depth=1, width=GROUP, heads=1, kv_heads=1, context=8), 300)
    with pytest.raises(ValueError, match="int8 weights are for a CPU; on meta the model runs in bfloat16"):
        quantize(elsewhere, WeightFormat.INT8)
