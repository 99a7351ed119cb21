from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standins.biased_model import CONTEXT, BiasedModel, naive

from nanochat.data.conversations import Part
from nanochat.inference import batch as batch_module
from nanochat.inference.batch import Batch, Prompt
from nanochat.inference.calculator import Calculator, Refusal, Result
from nanochat.inference.generation import Generation, Request
from nanochat.inference.prefixes import PrefixCache
from nanochat.inference.sampling import Sampling
from nanochat.inference.tools import ToolCall
from nanochat.tokenizer import Tokenizer

Answers = list[tuple[tuple[int, ...], tuple[ToolCall, ...]]]

TOKENS = 14
PROMPTS = 200


@pytest.fixture(scope="module")
def calculator() -> Iterator[Calculator]:
    calculator = Calculator()
    yield calculator
    calculator.close()


@pytest.fixture(scope="module")
def model(byte_tokenizer: Tokenizer) -> BiasedModel:
    return BiasedModel(byte_tokenizer, seed=8, kv_heads=2)


@pytest.fixture(scope="module")
def prompts(byte_tokenizer: Tokenizer) -> list[list[int]]:
    random_ = random.Random(2)
    return [
        [byte_tokenizer.bos, *(random_.randrange(256) for _ in range(random_.randrange(CONTEXT - 1)))]
        for _ in range(PROMPTS)
    ]


@pytest.fixture(scope="module")
def expected(
    model: BiasedModel, byte_tokenizer: Tokenizer, calculator: Calculator, prompts: list[list[int]]
) -> Answers:
    return naive(model, byte_tokenizer, calculator, prompts, TOKENS)


def finish(batch: Batch) -> None:
    while not batch.idle:
        batch.step()


def answers(prompt: Prompt) -> list[Generation]:
    return [row.generation() for row in prompt.rows]


@pytest.mark.parametrize(("max_rows", "remember"), [(1, False), (7, False), (64, True)])
def test_200_prompts_get_what_computing_everything_anew_gives(
    model: BiasedModel,
    byte_tokenizer: Tokenizer,
    calculator: Calculator,
    prompts: list[list[int]],
    expected: Answers,
    max_rows: int,
    remember: bool,
) -> None:
    outcomes = [call.outcome for _, calls in expected for call in calls]
    assert {type(outcome) for outcome in outcomes} == {Result, Refusal}
    prefixes = PrefixCache(10**6) if remember else None
    batch = Batch(model, byte_tokenizer, calculator, max_rows=max_rows, prefixes=prefixes)
    # Twice: the second time a remembering batch knows all beginnings.
    for _ in range(1 + remember):
        asked = [
            batch.add(Request(prompt=prompt, sampling=Sampling(max_tokens=TOKENS))) for prompt in prompts
        ]
        finish(batch)
        for prompt, (ids, calls) in zip(asked, expected, strict=True):
            (generation,) = answers(prompt)
            assert (generation.ids, generation.tool_calls) == (ids, calls)
    assert remember == any(prompt.reused for prompt in asked)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_requests_join_and_leave_at_any_step(
    data: st.DataObject,
    model: BiasedModel,
    byte_tokenizer: Tokenizer,
    calculator: Calculator,
    prompts: list[list[int]],
    expected: Answers,
) -> None:
    batch = Batch(
        model, byte_tokenizer, calculator, max_rows=data.draw(st.integers(1, 6)), prefixes=PrefixCache(20_000)
    )
    asked: dict[int, Prompt] = {}
    cancelled: set[int] = set()
    for _ in range(data.draw(st.integers(1, 12))):
        for index in data.draw(st.sets(st.integers(0, PROMPTS - 1), max_size=4)) - set(asked):
            sampling = Sampling(max_tokens=TOKENS)
            asked[index] = batch.add(Request(prompt=prompts[index], sampling=sampling))
        for _ in range(data.draw(st.integers(0, 5))):
            batch.step()
        assert len(batch.rows) <= batch.max_rows
        if asked and data.draw(st.booleans()):
            index = data.draw(st.sampled_from(sorted(asked)))
            if not asked[index].ended:
                cancelled.add(index)
            batch.cancel(asked[index])
    finish(batch)
    for index, prompt in asked.items():
        (generation,) = answers(prompt)
        ids, calls = expected[index]
        if index in cancelled:
            assert generation.finish_reason == "cancelled"
            assert generation.ids == ids[: len(generation.ids)]
        else:
            assert (generation.ids, generation.tool_calls) == (ids, calls)


def test_long_prompts_are_read_in_pieces_between_which_others_go_on(
    model: BiasedModel,
    byte_tokenizer: Tokenizer,
    calculator: Calculator,
    prompts: list[list[int]],
    expected: Answers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_module, "READ_TOKENS", 8)
    order = sorted(range(PROMPTS), key=lambda index: len(prompts[index]))
    short = next(index for index in order if len(expected[index][0]) == TOKENS)
    long = next(index for index in reversed(order) if expected[index][0])
    batch = Batch(model, byte_tokenizer, calculator)
    first = batch.add(Request(prompt=prompts[short], sampling=Sampling(max_tokens=TOKENS)))
    batch.step()
    second = batch.add(Request(prompt=prompts[long], sampling=Sampling(max_tokens=TOKENS)))
    passes = -(-len(prompts[long]) // 8)
    for _ in range(passes - 1):
        before = len(first.rows[0].tokens)
        batch.step()
        assert len(first.rows[0].tokens) == before + 1
        assert not second.rows[0].tokens
    finish(batch)
    for index, prompt in ((short, first), (long, second)):
        assert answers(prompt)[0].ids == expected[index][0]


def test_n_answers_share_the_reading_of_their_prompt_and_differ(
    byte_tokenizer: Tokenizer, calculator: Calculator
) -> None:
    read = []

    class Watched(BiasedModel):
        def forward(self, ids_BT: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
            read.append(tuple(ids_BT.shape))
            return super().forward(ids_BT, *args, **options)  # type: ignore[arg-type]

    model = Watched(byte_tokenizer, seed=3, kv_heads=4)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5)
    batch = Batch(model, byte_tokenizer, calculator)
    together = batch.add(Request(prompt=[1, 2, 3, 4], sampling=sampling, n=3))
    finish(batch)
    assert read[0] == (1, 4)
    assert all(shape[1] == 1 for shape in read[1:])
    said = [generation.ids for generation in answers(together)]
    assert len(set(said)) == 3
    for stream, ids in enumerate(said):
        alone = batch.add(Request(prompt=[1, 2, 3, 4], sampling=sampling, stream=stream))
        finish(batch)
        assert answers(alone)[0].ids == ids


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_k": 5},
        {"temperature": 1.2, "seed": 3, "top_p": 0.7},
        {"temperature": 1.0, "seed": 4, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.5},
        {"repetition_penalty": 2.0},
        {"logprobs": 3},
    ],
)
def test_wishes_are_each_requests_own(
    byte_tokenizer: Tokenizer, calculator: Calculator, model: BiasedModel, wish: dict[str, float]
) -> None:
    sampling = Sampling(max_tokens=16, **wish)  # type: ignore[arg-type]
    batch = Batch(model, byte_tokenizer, calculator)
    alone = batch.add(Request(prompt=[1, 2, 3], sampling=sampling))
    finish(batch)
    others = [
        Sampling(max_tokens=20),
        Sampling(max_tokens=9, temperature=2.0, seed=9),
        Sampling(max_tokens=20, temperature=1.0, top_k=3, seed=9),
        Sampling(max_tokens=14, temperature=1.0, top_p=0.5, repetition_penalty=3.0, seed=9),
    ]
    for other in others[:2]:
        batch.add(Request(prompt=[9, 8], sampling=other))
    batch.step()
    again = batch.add(Request(prompt=[1, 2, 3], sampling=sampling))
    batch.step()
    for other in others[2:]:
        batch.add(Request(prompt=[7] * 9, sampling=other))
    finish(batch)
    (first,), (second,) = answers(alone), answers(again)
    assert second.ids == first.ids
    for one, two in zip(first.tokens, second.tokens, strict=True):
        assert one.logprob == (None if two.logprob is None else pytest.approx(two.logprob, abs=1e-4))


def test_log_probabilities_are_the_models_own(
    byte_tokenizer: Tokenizer, calculator: Calculator, model: BiasedModel
) -> None:
    sampling = Sampling(max_tokens=20, temperature=3.0, seed=1, repetition_penalty=2.0, logprobs=4)
    batch = Batch(model, byte_tokenizer, calculator)
    asked = batch.add(Request(prompt=[1, 2, 3], sampling=sampling))
    finish(batch)
    (generation,) = answers(asked)
    ids = [1, 2, 3, *generation.ids]
    with torch.no_grad():
        logprobs_TV = torch.log_softmax(model(torch.tensor([ids]))[0], dim=-1)
    for position, token in enumerate(generation.tokens):
        of_next_V = logprobs_TV[2 + position]
        assert token.logprob == pytest.approx(float(of_next_V[token.id]), abs=1e-4)
        values, likeliest = of_next_V.topk(4)
        assert [other for other, _ in token.top] == likeliest.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_next_turn_reads_the_new_question_only(
    byte_tokenizer: Tokenizer, calculator: Calculator, model: BiasedModel
) -> None:
    batch = Batch(model, byte_tokenizer, calculator, prefixes=PrefixCache(10**6))
    first = batch.add(Request(prompt=list(range(10)), sampling=Sampling(max_tokens=8)))
    finish(batch)
    said = answers(first)[0].ids
    known = 10 + len(said) - (answers(first)[0].stop_id is None)  # the newest token was not read
    second = batch.add(Request(prompt=[*range(10), *said, 65, 66, 67], sampling=Sampling(max_tokens=8)))
    finish(batch)
    assert (first.reused, second.reused) == (0, known)


HOSTILE = [
    "9**9**9**9",
    "2**(10**9)",
    "10**(10**8)",
    "9**99999999 % 7",
    "7**7**7**7 // 3",
    "-9**9**9",
    "1/0",
    "0**-1",
    "(1).__class__",
    "''.__class__",
    "().__class__.__bases__",
    "'a'.count.__self__",
    "[].append(1)",
    "{}[0]",
    "__import__('os')",
    "import os",
    "open('/etc/passwd')",
    "eval('1')",
    "exec('x=1')",
    "exit()",
    "print(1)",
    "lambda: 1",
    "[x for x in range(10**9)]",
    "sum(range(10**9))",
    "while True: pass",
    "(x:=1)",
    "1 if 1 else 2",
    "'a'*10**10",
    "'a'.zfill(2000000000).count('0')",
    "'a'.join(['b']*9).count('b')",
    "'%99999999d'%1",
    "f'{1:>99999999}'",
    "'a'.count('b'*10**9)",
    "('a'*9).count('a')",
    "'\\x41'.count('A')",
    "globals()",
    "1e308*1e308",
    "float('nan')",
    "((((((((((1))))))))))**9**9**9",
    "'" + "a" * 300 + "'.count('a')",
]


def test_40_hostile_calls_end_in_an_error_and_the_answers_go_on(
    byte_tokenizer: Tokenizer, script: object, spell: object
) -> None:
    from nanochat.inference.scheduler import Scheduler

    assert len(HOSTILE) == len(set(HOSTILE)) == 40
    said = "a<|python_start|>{}<|python_end|><|output_start|>error<|output_end|>b"
    scripts = {(number,): spell(said.format(code)) for number, code in enumerate(HOSTILE)}  # type: ignore[operator]
    with Scheduler(script(scripts, context=400), byte_tokenizer) as scheduler:  # type: ignore[operator]
        handles = [
            scheduler.submit(Request(prompt=[number], sampling=Sampling(max_tokens=399)))
            for (number,) in scripts
        ]
        for code, handle in zip(HOSTILE, handles, strict=True):
            (generation,) = handle.result()
            assert generation.text == "ab", code
            assert Part("python_output", "error") in generation.parts, code
            assert generation.finish_reason == "stop"
