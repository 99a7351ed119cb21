"""The client of an endpoint's jobs: where it asks, what it sends again, what it never does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from standins.runpod_api import CANARY, Clock, problem

from dagster_nanochat.launch.runpod import errors
from dagster_nanochat.launch.runpod.endpoint_models import (
    Endpoint,
    JobPolicy,
    JobRequest,
    JobStatus,
    RequestUrls,
)
from dagster_nanochat.launch.runpod.jobs import JobClient, urls_of

# Of no scheme that could be guessed: they are the endpoint's to tell.
URLS = RequestUrls(
    run="https://jobs.example/a/b/run",
    status="https://jobs.example/state?of={job_id}",
    stream="https://jobs.example/a/b/stream/{job_id}",
    cancel="https://jobs.example/end/{job_id}",
    health="https://jobs.example/a/b/health",
)
JOB = JobRequest(
    input={"question": "Why?", "seed": None}, policy=JobPolicy(execution_timeout=60_000, ttl=90_000)
)
JobsOf = Callable[..., JobClient]


@pytest.fixture
def jobs_answered_by(clock: Clock) -> JobsOf:
    def make(handler: Callable[[httpx.Request], httpx.Response]) -> JobClient:
        transport = httpx.MockTransport(handler)
        return JobClient(CANARY, URLS, transport=transport, sleep=clock.sleep, clock=clock)

    return make


def test_every_request_goes_where_the_endpoint_says(jobs_answered_by: JobsOf) -> None:
    sent: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append((request.method, str(request.url)))
        assert request.headers["authorization"] == f"Bearer {CANARY}"
        if request.url.path.endswith("/run"):
            assert json.loads(request.content) == {
                "input": {"question": "Why?", "seed": None},
                "policy": {"executionTimeout": 60_000, "ttl": 90_000},
            }
        if request.url.path.endswith("/health"):
            return httpx.Response(200, json={"jobs": {}, "workers": {"idle": 1, "throttled": 2}})
        told = {"id": "j1", "status": "IN_PROGRESS", "stream": [{"output": "a"}, {"output": {"b": 1}}]}
        return httpx.Response(200, json={**told, "delayTime": 120, "workerId": "w"})

    jobs = jobs_answered_by(answer)
    assert jobs.run(JOB).id == "j1"
    assert (jobs.status("j1").delay_time, jobs.status("j1").worker_id) == (120, "w")
    assert [piece.output for piece in jobs.stream("j1").stream] == ["a", {"b": 1}]
    assert not jobs.cancel("j1").status.final
    workers = jobs.health().workers
    assert (workers.warm, workers.describe()) == (True, "1 idle, 2 throttled")
    assert list(dict.fromkeys(sent)) == [
        ("POST", "https://jobs.example/a/b/run"),
        ("GET", "https://jobs.example/state?of=j1"),
        ("GET", "https://jobs.example/a/b/stream/j1"),
        ("POST", "https://jobs.example/end/j1"),
        ("GET", "https://jobs.example/a/b/health"),
    ]


@pytest.mark.parametrize("failure", [problem(502, "bad gateway"), httpx.ReadTimeout("t")])
def test_a_job_whose_outcome_nobody_knows_is_not_sent_again(
    failure: httpx.Response | Exception, jobs_answered_by: JobsOf
) -> None:
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        if isinstance(failure, Exception):
            raise failure
        return failure

    with pytest.raises(errors.MaybeCreated, match=r"may have been queued all the same; .* after 90 s"):
        jobs_answered_by(answer).run(JOB)
    assert len(sent) == 1


def test_asking_and_cancelling_are_repeated(jobs_answered_by: JobsOf, clock: Clock) -> None:
    answers: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        return answers.pop(0)

    jobs = jobs_answered_by(answer)
    for call in (jobs.status, jobs.cancel):
        done = httpx.Response(200, json={"id": "j", "status": "CANCELLED"})
        answers[:] = [problem(503, "busy"), problem(429, "slow down"), done]
        assert call("j").status is JobStatus.CANCELLED
    assert clock.slept == [1.0, 2.0] * 2


def test_a_refusal_in_the_words_of_this_api_is_told(jobs_answered_by: JobsOf) -> None:
    jobs = jobs_answered_by(lambda request: httpx.Response(404, json={"error": "job not found"}))
    with pytest.raises(errors.NotFound, match="job not found"):
        jobs.status("j")


def test_a_state_that_there_is_not_is_no_answer(jobs_answered_by: JobsOf) -> None:
    jobs = jobs_answered_by(lambda request: httpx.Response(200, json={"id": "j", "status": "PAUSED"}))
    with pytest.raises(errors.RunPodError, match="a Job that cannot be read"):
        jobs.status("j")


def test_an_empty_input_is_never_sent() -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        JobRequest(input={}, policy=JOB.policy)


def test_an_endpoint_without_a_queue_is_refused_by_name() -> None:
    balanced = {"base": "https://e1.example", "health": "https://e1.example/ping"}
    for urls in (None, balanced):
        with pytest.raises(errors.RunPodError, match=r"endpoint mine \(e1\) has no queue"):
            urls_of(Endpoint(id="e1", name="mine", request_urls=urls))
