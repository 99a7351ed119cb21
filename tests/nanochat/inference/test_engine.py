from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from standins.biased_model import CONTEXT, BiasedModel, naive
from torch import Tensor

from nanochat.data.conversations import Part
from nanochat.inference.calculator import Calculator, Refusal, Result
from nanochat.inference.engine import Engine
from nanochat.inference.generation import Generation
from nanochat.inference.sampling import Sampling
from nanochat.inference.tools import ToolCall, join_pieces
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

Spell = Callable[[str], list[int]]
Script = Callable[..., GPT]


@pytest.mark.parametrize(("seed", "kv_heads"), [(8, 4), (11, 2)])
def test_batched_output_equals_computing_everything_anew(
    byte_tokenizer: Tokenizer, seed: int, kv_heads: int
) -> None:
    model = BiasedModel(byte_tokenizer, seed=seed, kv_heads=kv_heads)
    random_ = random.Random(1)
    prompts = [
        [byte_tokenizer.bos, *(random_.randrange(256) for _ in range(random_.randrange(CONTEXT - 1)))]
        for _ in range(70)
    ]
    calculator = Calculator()
    expected = naive(model, byte_tokenizer, calculator, prompts, 30)
    calls = [call for _, calls in expected for call in calls]
    assert sum(isinstance(call.outcome, Result) for call in calls) >= 3
    assert sum(isinstance(call.outcome, Refusal) for call in calls) >= 3
    assert len({len(ids) for ids, _ in expected}) > 5
    for max_batch in (7, 64):
        engine = Engine(model, byte_tokenizer, calculator, max_batch=max_batch)
        generations = engine.generate(prompts, Sampling(max_tokens=30))
        for generation, (ids, said_calls) in zip(generations, expected, strict=True):
            assert generation.ids == ids
            assert generation.tool_calls == said_calls
    calculator.close()


def answer(model: GPT, tokenizer: Tokenizer, prompt: list[int], max_tokens: int = 60) -> Generation:
    (generation,) = Engine(model, tokenizer).generate([prompt], Sampling(max_tokens=max_tokens))
    return generation


def test_a_call_gets_its_result_whatever_the_model_would_have_said(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    # The model would say "output_start 99 output_end"; the two digits are replaced by the result's.
    said = spell("It is <|python_start|>17+25<|python_end|><|output_start|>99<|output_end|>42.")
    model = script({(1,): said})
    generation = answer(model, byte_tokenizer, [1])
    assert generation.text == "It is 42."
    assert generation.parts == (
        Part("text", "It is "),
        Part("python", "17+25"),
        Part("python_output", "42"),
        Part("text", "42."),
    )
    assert generation.tool_calls == (ToolCall("17+25", Result("42")),)
    forced = [
        token for token, was_forced in zip(generation.ids, generation.forced, strict=True) if was_forced
    ]
    assert forced == spell("<|output_start|>42<|output_end|>")
    assert generation.finish_reason == "stop"
    assert generation.stop_id == byte_tokenizer.special("<|assistant_end|>")


@pytest.mark.parametrize("code", ["1/0", "__import__('os').system('true')", "9**9**9**9", "", "'a'*10**9"])
def test_a_bad_call_says_error_and_the_answer_goes_on(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell, code: str
) -> None:
    said = spell(f"a<|python_start|>{code}<|python_end|><|output_start|>error<|output_end|>b")
    generation = answer(script({(1,): said}), byte_tokenizer, [1])
    assert generation.text == "ab"
    (call,) = generation.tool_calls
    assert call.expression == code
    assert isinstance(call.outcome, Refusal)
    assert Part("python_output", "error") in generation.parts


@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        ("a<|python_end|>b", "ab", 0),
        ("a<|output_end|>b", "ab", 0),
        ("a<|output_start|>7<|output_end|>b", "ab", 0),
        ("a<|python_start|>1+<|python_start|>2<|python_end|><|output_start|>2<|output_end|>b", "ab", 1),
        ("a<|python_start|>1+1", "a", 0),
        ("a<|user_start|>b<|user_end|>", "ab", 0),
        ("a<|python_start|>1<|output_start|>7<|output_end|>b", "ab", 0),
    ],
)
def test_disordered_markers_end_nothing(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell, said: str, text: str, calls: int
) -> None:
    generation = answer(script({(1,): spell(said)}), byte_tokenizer, [1])
    assert generation.text == text
    assert len(generation.tool_calls) == calls
    assert generation.finish_reason == "stop"


def test_an_answer_ends_at_bos_too(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    generation = answer(script({(1,): spell("one<|bos|>two")}), byte_tokenizer, [1])
    assert (generation.text, generation.stop_id) == ("one", byte_tokenizer.bos)


def test_a_full_context_and_max_tokens_end_with_length(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    model = script({(1,): spell("x" * 100), (2,): spell("<|python_start|>10**20<|python_end|>")}, context=32)
    full = answer(model, byte_tokenizer, [1] * 20, max_tokens=100)
    assert (len(full.ids), full.finish_reason, full.stop_id) == (12, "length", None)
    assert len(answer(model, byte_tokenizer, [1] * 31, max_tokens=100).ids) == 1
    capped = answer(model, byte_tokenizer, [1], max_tokens=5)
    assert (capped.text, capped.finish_reason) == ("xxxxx", "length")
    # Forced tokens count too: the result of 21 digits does not fit.
    cut = answer(model, byte_tokenizer, [2], max_tokens=12)
    assert (len(cut.ids), cut.finish_reason) == (12, "length")


@pytest.mark.parametrize(
    ("prompt", "reason"), [([], "empty"), ([1] * 32, "32 tokens"), ([1] * 33, "33 tokens")]
)
def test_a_prompt_without_room_is_refused_before_anything_runs(
    byte_tokenizer: Tokenizer, script: Script, prompt: list[int], reason: str
) -> None:
    engine = Engine(script({(1,): []}, context=32), byte_tokenizer)
    with pytest.raises(ValueError, match=f"prompt 2: .*{reason}"):
        engine.generate([[1], prompt], Sampling())
    with pytest.raises(ValueError, match="prompt 1"):
        engine.stream(prompt, Sampling())


def test_no_prompts_give_no_answers(byte_tokenizer: Tokenizer, script: Script) -> None:
    assert Engine(script({}), byte_tokenizer).generate([], Sampling()) == []


def test_finished_rows_leave_the_batch(byte_tokenizer: Tokenizer, script: Script, spell: Spell) -> None:
    answers = {(number,): spell("x" * (number + 1)) for number in range(20)}
    model = script(answers)
    prompts = [[number] for number in range(20)]
    generations = Engine(model, byte_tokenizer).generate(prompts, Sampling())
    assert [len(generation.ids) for generation in generations] == list(range(1, 21))
    assert model.rows_read[0] == 20
    assert model.rows_read[-1] <= 3
    assert sum(model.rows_read) < 0.8 * 20 * 21


def test_a_long_row_that_ends_early_does_not_stop_the_others(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    model = script({(1,): [], **{(n,): spell("y" * 25) for n in range(2, 10)}}, context=32)
    prompts = [[1] * 31, *([n] for n in range(2, 10))]
    generations = Engine(model, byte_tokenizer).generate(prompts, Sampling(max_tokens=30))
    assert [generation.text for generation in generations] == ["", *["y" * 25] * 8]


def test_only_the_last_position_of_a_prompt_is_given_logits(byte_tokenizer: Tokenizer) -> None:
    shapes = []

    class Watched(BiasedModel):
        def forward(self, *args: Tensor, **options: object) -> Tensor:
            logits = super().forward(*args, **options)
            shapes.append(tuple(logits.shape))
            return logits

    model = Watched(byte_tokenizer, seed=0, kv_heads=4)
    Engine(model, byte_tokenizer).generate([[1] * 20, [2] * 30], Sampling(max_tokens=3))
    assert {shape[1] for shape in shapes} == {1}


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(byte_tokenizer: Tokenizer) -> None:
    class Padded(BiasedModel):
        def forward(self, *args: Tensor, **options: object) -> Tensor:
            logits = super().forward(*args, **options)
            return torch.cat([logits, torch.full((*logits.shape[:2], 5), 50.0)], dim=-1)

    model = Padded(byte_tokenizer, seed=0, kv_heads=4)
    for sampling in (Sampling(max_tokens=20), Sampling(max_tokens=20, temperature=1.0, seed=0)):
        (generation,) = Engine(model, byte_tokenizer).generate([[1, 2, 3]], sampling)
        assert max(generation.ids) < byte_tokenizer.vocab_size


def test_a_seed_repeats_itself_whatever_else_is_in_the_batch(byte_tokenizer: Tokenizer) -> None:
    engine = Engine(BiasedModel(byte_tokenizer, seed=3, kv_heads=4), byte_tokenizer)
    sampling = Sampling(max_tokens=20, temperature=1.0, top_k=20, seed=7)
    first = engine.generate([[1, 2]], sampling)[0]
    assert engine.generate([[1, 2], [3] * 30, [4]], sampling)[0] == first
    assert Engine(engine.model, byte_tokenizer, max_batch=1).generate([[1, 2], [3]], sampling)[0] == first
    assert "".join(engine.stream([1, 2], sampling)) == first.text
    # Two rows of one prompt are two samples, and another seed is another sample.
    twins = engine.generate([[1, 2], [1, 2]], sampling)
    assert twins[0] != twins[1]
    other = Sampling(max_tokens=20, temperature=1.0, top_k=20, seed=8)
    assert engine.generate([[1, 2]], other)[0] != first


@pytest.mark.parametrize(
    "text",
    ["naïve café", "日本語です", " 😀😀 th😀e", "a\u0301 👩‍👩‍👧 end"],
)
def test_a_stream_never_cuts_a_character(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell, text: str
) -> None:
    engine = Engine(script({(1,): spell(text)}), byte_tokenizer)
    pieces = list(engine.stream([1], Sampling()))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) > 1


def test_bytes_that_are_no_text_become_replacement_characters(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    emoji = "😀".encode()
    said = [
        *emoji[:2],
        *spell("a<|python_start|>1"),
        emoji[0],
        *spell("<|python_end|>"),
        *[0] * 7,
        *emoji[:3],
    ]
    engine = Engine(script({(1,): said}), byte_tokenizer)
    (generation,) = engine.generate([[1]], Sampling())
    assert generation.parts[0] == Part("text", "\ufffda")
    assert generation.parts[1] == Part("python", "1\ufffd")
    assert generation.text.endswith("\ufffd")
    assert "".join(engine.stream([1], Sampling())) == generation.text


def test_streamed_parts_join_to_the_generations_parts(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    said = spell("s<|python_start|>'été'.count('é')<|python_end|><|output_start|>2<|output_end|>2 é")
    engine = Engine(script({(1,): said}), byte_tokenizer)
    pieces = list(engine.stream_parts([1], Sampling()))
    (generation,) = engine.generate([[1]], Sampling())
    joined: dict[str, str] = {}
    for piece in pieces:
        joined[piece.type] = joined.get(piece.type, "") + piece.text
    assert joined == {"text": "s2 é", "python": "'été'.count('é')", "python_output": "2"}
    assert "".join(part.text for part in generation.parts) == "".join(piece.text for piece in pieces)


def test_a_stream_may_be_left_and_the_engine_used_again(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    engine = Engine(script({(1,): spell("hello there")}), byte_tokenizer)
    stream = engine.stream([1], Sampling())
    assert next(stream) == "he"
    stream.close()
    assert engine.generate([[1]], Sampling())[0].text == "hello there"


def test_a_stop_string_ends_the_answer_before_it(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    said = "one EN<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>D two END three"
    engine = Engine(script({(1,): spell(said)}, context=100), byte_tokenizer)
    sampling = Sampling(stop=("END",))
    (generation,) = engine.generate([[1]], sampling)
    # A stop string does not reach across a call, nor is the calculator's part looked through.
    assert generation.text == "one END two "
    assert (generation.finish_reason, generation.stop_id) == ("stop", None)
    assert len(generation.ids) == len(spell(said.removesuffix(" three")))
    pieces = list(engine.stream_parts([1], sampling))
    assert join_pieces(pieces) == generation.parts
    assert [piece.text for piece in pieces][:5] == ["o", "n", "e", " ", "EN"]


def test_what_could_have_become_a_stop_string_is_said_at_the_end(
    byte_tokenizer: Tokenizer, script: Script, spell: Spell
) -> None:
    engine = Engine(script({(1,): spell("so EN"), (2,): spell("xx😀")}), byte_tokenizer)
    assert engine.generate([[1]], Sampling(stop=("END",)))[0].text == "so EN"
    (generation,) = engine.generate([[2]], Sampling(stop=("😀",)))
    assert (generation.text, generation.finish_reason) == ("xx", "stop")


def test_an_engine_with_a_memory_reads_the_next_turn_only(byte_tokenizer: Tokenizer) -> None:
    read = []

    class Watched(BiasedModel):
        def forward(self, ids_BT: Tensor, *args: Tensor, **options: object) -> Tensor:
            read.append(ids_BT.shape[1])
            return super().forward(ids_BT, *args, **options)

    model = Watched(byte_tokenizer, seed=8, kv_heads=4)
    for cache_bytes, tokens in ((0, 20), (10**6, 6)):
        engine = Engine(model, byte_tokenizer, prefix_cache_bytes=cache_bytes)
        stream = engine.stream_parts(list(range(14)), Sampling(max_tokens=5))
        next(stream)
        stream.close()
        read.clear()
        engine.generate([[*range(14), 1, 2, 3, 4, 5, 6]], Sampling(max_tokens=2))
        assert read[0] == tokens
