"""The calls of OpenAI's own client, which knows nothing of this server but its address."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import openai
import pytest
from standins.served_script import LONG, MESSAGES, TEXT, Served
from standins.waiting import wait_for

from nanochat.serving.gate import Limits

pytestmark = pytest.mark.timeout(120)

ASKED: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
LONG_ASKED: dict[str, Any] = {"model": "tiny", "prompt": "Long", "max_tokens": LONG}


def test_the_asynchronous_client_asks_several_things_at_once(served: Callable[..., Served]) -> None:
    async def ask(client: openai.AsyncOpenAI) -> tuple[list[str | None], str]:
        async with client:
            answers = await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(4)))
            text = ""
            async for chunk in await client.chat.completions.create(**ASKED, stream=True):
                text += chunk.choices[0].delta.content or ""
            assert [model.id async for model in client.models.list()] == ["tiny"]
        return [answer.choices[0].message.content for answer in answers], text

    assert asyncio.run(ask(served().async_client())) == ([TEXT] * 4, TEXT)


def test_raw_responses_have_the_servers_headers(served: Callable[..., Served]) -> None:
    client = served().client()
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    assert (raw.status_code, raw.headers["content-type"]) == (200, "application/json")
    assert raw.parse().choices[0].message.content == TEXT
    with client.chat.completions.with_streaming_response.create(**ASKED, stream=True) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["cache-control"] == "no-store"
        assert list(streamed.iter_lines())[-2] == "data: [DONE]"


def test_the_helper_for_streams_puts_the_answer_together(served: Callable[..., Served]) -> None:
    with served().client().chat.completions.stream(**ASKED) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        whole = stream.get_final_completion()
    assert "".join(pieces) == whole.choices[0].message.content == TEXT
    assert whole.choices[0].finish_reason == "stop"
    called = (whole.choices[0].message.model_extra or {})["nanochat"]["parts"]
    assert [(part["type"], part["text"]) for part in called] == [("python", "1+1"), ("python_output", "2")]


def test_several_answers_are_streamed_side_by_side(served: Callable[..., Served]) -> None:
    texts: dict[int, str] = defaultdict(str)
    reasons: dict[int, str] = {}
    usage = None
    options: dict[str, Any] = {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    for chunk in served().client().chat.completions.create(**ASKED, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: TEXT, 1: TEXT}
    assert reasons == {0: "stop", 1: "stop"}
    assert usage is not None
    assert usage.completion_tokens > 2 * len(TEXT)


@pytest.mark.parametrize("stop", ["It", ["never said", "It"]])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_before_a_stop_sequence(
    served: Callable[..., Served], stop: Any, stream: bool
) -> None:
    answer: Any = served().client().chat.completions.create(**ASKED, stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "s"
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == "s"
        assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_streamed_with_their_tokens(served: Callable[..., Served]) -> None:
    chunks = list(
        served().client().chat.completions.create(**ASKED, stream=True, logprobs=True, top_logprobs=2)
    )
    told = [chunk.choices[0].logprobs for chunk in chunks]
    tokens = [token for one in told if one is not None for token in one.content or []]
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode().endswith("It is 2 é😀")
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.top_logprobs[0].logprob >= token.logprob for token in tokens)


def test_a_seed_draws_the_same_again(served: Callable[..., Served]) -> None:
    client = served().client()

    def draw(seed: int | None) -> list[str | None]:
        answer = client.chat.completions.create(**ASKED, temperature=2, seed=seed, max_tokens=30, n=2)
        return [choice.message.content for choice in answer.choices]

    first, second = draw(7)
    assert [first, second] == draw(7)
    assert first != second
    assert len({tuple(draw(seed)) for seed in (7, 8, None, None)}) == 4


def test_the_newer_name_of_the_length_goes_before_the_older(served: Callable[..., Served]) -> None:
    client = served().client()
    answer = client.chat.completions.create(**ASKED, max_completion_tokens=3, max_tokens=50)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_what_is_wrong_is_raised_as_the_client_knows_it(served: Callable[..., Served]) -> None:
    one = served(api_keys=("key",))
    client = one.client("key")
    assert client.models.retrieve("tiny").id == "tiny"
    wrong: list[tuple[type[openai.APIStatusError], str, Callable[[], Any]]] = [
        (openai.NotFoundError, "model_not_found", lambda: client.models.retrieve("gpt-9")),
        (
            openai.NotFoundError,
            "model_not_found",
            lambda: client.chat.completions.create(**{**ASKED, "model": "gpt-9"}),
        ),
        (
            openai.AuthenticationError,
            "invalid_api_key",
            lambda: one.client("no").chat.completions.create(**ASKED),
        ),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            lambda: client.completions.create(model="tiny", prompt="x" * 300),
        ),
        (
            openai.BadRequestError,
            "invalid_value",
            lambda: client.chat.completions.create(**ASKED, temperature=-1),
        ),
        (
            openai.UnprocessableEntityError,
            "invalid_request",
            lambda: client.chat.completions.create(**ASKED, seed="seven"),  # type: ignore[arg-type]
        ),
    ]
    for kind, code, call in wrong:
        with pytest.raises(kind) as raised:
            call()
        assert raised.value.code == code
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED, logit_bias={"5": 10})
    assert refused.value.param == "logit_bias"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")


def test_a_body_that_is_far_too_long_is_told_so_and_not_cut_off(served: Callable[..., Served]) -> None:
    client = served().client()
    messages: list[Any] = [{"role": "user", "content": "x" * 8_000_000}]
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(model="tiny", messages=messages)
    assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")


def test_a_client_that_may_retry_waits_as_long_as_it_is_told_and_is_answered(
    served: Callable[..., Served],
) -> None:
    one = served(limits=Limits(client_requests_per_minute=60))
    client = one.client().with_options(max_retries=3)
    for _ in range(60):
        one.doors.enter("127.0.0.1")
        one.doors.leave("127.0.0.1")
    assert client.chat.completions.create(**ASKED).choices[0].message.content == TEXT
    assert one.doors.refused[429] == 1


def test_a_client_that_has_waited_long_enough_frees_its_place(served: Callable[..., Served]) -> None:
    one = served(context=LONG + 100, max_tokens=LONG)
    one.gate.clear()
    client = one.client().with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(**LONG_ASKED)
    one.gate.set()
    wait_for(lambda: one.scheduler.stats().running == 0 and one.doors.open == 0, within_s=5)


def test_a_stream_that_is_closed_in_the_middle_frees_its_place(served: Callable[..., Served]) -> None:
    one = served(context=LONG + 100, max_tokens=LONG)
    one.model.pace_s = 0.02
    stream = one.client().completions.create(**LONG_ASKED, stream=True)
    assert {text for _ in range(3) for text in next(stream).choices[0].text} == {"x"}
    stream.close()
    wait_for(lambda: one.scheduler.stats().running == 0 and one.doors.open == 0, within_s=5)

    async def cancelled() -> None:
        async with one.async_client() as client:
            asking = asyncio.ensure_future(client.completions.create(**LONG_ASKED))
            await asyncio.to_thread(wait_for, lambda: one.scheduler.stats().running == 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(cancelled())
    wait_for(lambda: one.scheduler.stats().running == 0 and one.doors.open == 0, within_s=5)
