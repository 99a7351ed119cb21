"""What the client does with RunPod's answers: what it repeats, what it never does, what it says."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from standins.runpod_api import CANARY, Clock, problem

from dagster_nanochat.launch.runpod import errors
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.endpoint_models import (
    EndpointGpu,
    EndpointRequest,
    QueueDelay,
    WorkerLimits,
)
from dagster_nanochat.launch.runpod.exchange import API_URL
from dagster_nanochat.launch.runpod.models import ClusterCompute, ClusterRequest, GpuRequest, PodRequest

POD = PodRequest(name="dg-token", image="i", disk=1, gpu=GpuRequest(id="NVIDIA L4"))
CLUSTER = ClusterRequest(
    name="dg-token",
    image="i",
    disk=1,
    compute=ClusterCompute(gpu_type_id="NVIDIA L4", gpu_count_per_pod=1, pod_count=2),
)
NO_INSTANCES = (
    "There are no longer any instances available with the requested specifications. "
    "Please refresh and try again."
)
WORKERS_QUOTA = (
    "Max workers across all endpoints must not exceed your workers quota (5). Reduce the max workers for "
    "other endpoints or lower the max worker count for this endpoint to at most 0."
)
ENDPOINT = EndpointRequest(
    name="nanochat-d4",
    image="i",
    gpu=EndpointGpu(pools=("ADA_24",)),
    workers=WorkerLimits(min=0, max=2, idle_timeout=60),
    scaling=QueueDelay(queue_delay=4),
)
ClientOf = Callable[..., RunPodClient]
Answer = httpx.Response | Exception


class Script:
    """Answers one after the other, and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _pods(*ids: str, **fields: Any) -> httpx.Response:
    return httpx.Response(200, json={"pods": [{"id": pod_id} for pod_id in ids], **fields})


READS_AND_REMOVALS: list[Callable[[RunPodClient], Any]] = [
    lambda client: client.get_pod("p"),
    lambda client: client.list_pods(),
    lambda client: client.delete_pod("p"),
    lambda client: client.terminate("p"),
    lambda client: client.delete_cluster("c"),
    lambda client: client.get_endpoint("p"),
    lambda client: client.update_endpoint("p", ENDPOINT.as_change()),
    lambda client: client.delete_endpoint("e"),
]
CREATIONS: list[Callable[[RunPodClient], Any]] = [
    lambda client: client.create_pod(POD),
    lambda client: client.create_cluster(CLUSTER),
    lambda client: client.create_endpoint(ENDPOINT),
]


@pytest.mark.parametrize("call", READS_AND_REMOVALS)
@pytest.mark.parametrize(
    "failure",
    [problem(429, "slow down"), problem(503, "upstream"), httpx.ReadTimeout("t"), httpx.ConnectError("c")],
)
def test_reading_and_removing_is_repeated(
    call: Callable[[RunPodClient], Any], failure: Answer, client_of: ClientOf, clock: Clock
) -> None:
    script = Script(failure, failure, httpx.Response(200, json={"id": "p", "pods": []}))
    call(client_of(script))
    assert len(script.requests) == 3
    assert clock.slept == [1.0, 2.0]


@pytest.mark.parametrize("call", READS_AND_REMOVALS)
def test_repeating_ends_with_what_was_said_last(
    call: Callable[[RunPodClient], Any], client_of: ClientOf
) -> None:
    script = Script(*[problem(500, f"failure {n}") for n in range(9)])
    with pytest.raises(errors.Unavailable, match="failure 3"):
        call(client_of(script, attempts=4))
    assert len(script.requests) == 4


@pytest.mark.parametrize("call", CREATIONS)
@pytest.mark.parametrize(
    "failure",
    [
        problem(500, "boom"),
        problem(524, "a timeout"),
        httpx.ReadTimeout("t"),
        httpx.WriteError("w"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
        httpx.Response(201, text="<html>"),
        httpx.Response(201, json={"name": "a machine without an id"}),
    ],
)
def test_a_creation_whose_outcome_nobody_knows_is_not_repeated(
    call: Callable[[RunPodClient], Any], failure: Answer, client_of: ClientOf
) -> None:
    script = Script(failure)
    with pytest.raises(errors.MaybeCreated, match="token"):
        call(client_of(script))
    assert len(script.requests) == 1


@pytest.mark.parametrize("call", CREATIONS)
def test_a_creation_that_was_never_sent_has_created_nothing(
    call: Callable[[RunPodClient], Any], client_of: ClientOf
) -> None:
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(errors.Unavailable, match="refused"):
        call(client_of(script))
    assert len(script.requests) == 1


@pytest.mark.parametrize("call", CREATIONS)
def test_a_creation_is_sent_again_after_429_only(
    call: Callable[[RunPodClient], Any], client_of: ClientOf, clock: Clock
) -> None:
    limited = problem(429, "rate limit exceeded for the minute window", headers={"retry-after": "12"})
    script = Script(limited, httpx.Response(201, json={"id": "new"}))
    assert call(client_of(script)).id == "new"
    assert clock.slept == [12.0]
    script = Script(limited, problem(502, "bad gateway"))
    with pytest.raises(errors.MaybeCreated):
        call(client_of(script))


REFUSALS = [
    (problem(400, NO_INSTANCES), errors.NoCapacity, "no longer any instances"),
    (problem(400, "image: not allowed"), errors.RuleViolation, "image: not allowed"),
    (problem(400, WORKERS_QUOTA), errors.QuotaExceeded, "nanochat endpoints rm"),
    (problem(401, "missing bearer token"), errors.Unauthorized, "RUNPOD_API_KEY"),
    (problem(402, "insufficient balance"), errors.InsufficientBalance, "credit for at least an hour"),
    (problem(403, "access denied"), errors.Forbidden, "another GPU type"),
    (problem(409, "in a cluster"), errors.Conflict, "in a cluster"),
    (problem(410, "gone"), errors.RunPodError, "RUNPOD_API_URL, if set, must end in /v2"),
    (problem(413, "too large"), errors.RunPodError, "100 KiB"),
    (problem(422, "no", errors=["$: missing property 'name'"]), errors.Invalid, "missing property 'name'"),
    (httpx.Response(403, text="error code: 1010"), errors.Forbidden, "error code: 1010"),
    (httpx.Response(302, headers={"location": "/login"}), errors.RunPodError, "does not redirect"),
    (problem(418, "a teapot"), errors.RunPodError, "a teapot"),
]


@pytest.mark.parametrize(("answer", "kind", "said"), REFUSALS)
@pytest.mark.parametrize("call", [*READS_AND_REMOVALS, *CREATIONS])
def test_a_refusal_is_not_repeated_and_says_what_to_do(
    answer: httpx.Response,
    kind: type[errors.RunPodError],
    said: str,
    call: Callable[[RunPodClient], Any],
    client_of: ClientOf,
) -> None:
    script = Script(answer)
    with pytest.raises(errors.RunPodError) as caught:
        call(client_of(script))
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert caught.value.status == answer.status_code
    assert len(script.requests) == 1


def test_everything_that_an_answer_said_is_kept(client_of: ClientOf) -> None:
    wrong = ["$: missing property 'dataCenter'", "$: additional properties 'x' not allowed"]
    answer = problem(422, "Request validation failed.", errors=wrong)
    with pytest.raises(errors.Invalid) as caught:
        client_of(Script(answer)).create_pod(POD)
    error = caught.value
    assert (error.title, error.detail) == ("Unprocessable Entity", "Request validation failed.")
    assert (error.errors, error.request_id) == (tuple(wrong), "req-7")
    for part in ("POST /pods", "HTTP 422", "Request validation failed: ", *wrong, "req-7"):
        assert part in str(error)


def test_what_is_gone_is_none_or_done(client_of: ClientOf) -> None:
    client = client_of(lambda request: problem(404, "pod not found"))
    assert client.get_pod("p") is None
    assert client.get_cluster("c") is None
    client.delete_pod("p")
    client.terminate("p")
    client.delete_cluster("c")
    assert client.get_endpoint("e") is None
    client.delete_endpoint("e")
    for missing in (
        lambda: client.pod_logs("p"),
        lambda: client.cluster_pods("c"),
        lambda: client.update_endpoint("e", ENDPOINT.as_change()),
        lambda: client.endpoint_workers("e"),
    ):
        with pytest.raises(errors.NotFound):
            missing()


@pytest.mark.parametrize("status", [404, 405])
def test_an_api_without_secrets_has_none(status: int, client_of: ClientOf) -> None:
    assert client_of(lambda request: problem(status, "no")).secrets() is None
    with pytest.raises(errors.Forbidden):
        client_of(lambda request: problem(403, "no")).secrets()


def test_a_member_of_a_cluster_is_not_taken_for_gone(client_of: ClientOf) -> None:
    with pytest.raises(errors.Conflict):
        client_of(lambda request: problem(409, "member of a cluster")).delete_pod("p")


# --------------------------------------------------------------------------------------------------
# Pages


def test_all_pages_are_read(client_of: ClientOf) -> None:
    script = Script(
        _pods("a", "b", pagination={"nextCursor": "c2", "hasNextPage": True}),
        _pods("c", pagination={"nextCursor": None, "hasNextPage": False}),
    )
    pods = client_of(script).list_pods(include_cluster_pods=True)
    assert [pod.id for pod in pods] == ["a", "b", "c"]
    assert [dict(request.url.params) for request in script.requests] == [
        {"includeClusterPods": "true"},
        {"includeClusterPods": "true", "cursor": "c2"},
    ]


def test_a_list_without_pages_is_one(client_of: ClientOf) -> None:
    assert [pod.id for pod in client_of(Script(_pods("a"))).list_pods()] == ["a"]
    assert client_of(Script(httpx.Response(200, json={"pods": None}))).list_pods() == []


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, json={"machines": []}),
        httpx.Response(200, json=[]),
        httpx.Response(200, text="<html>a portal</html>"),
        httpx.Response(200, json={"pods": [{"name": "no id"}]}),
    ],
)
def test_a_strange_answer_is_never_taken_for_no_machines(answer: httpx.Response, client_of: ClientOf) -> None:
    with pytest.raises(errors.RunPodError):
        client_of(Script(answer)).list_pods()


def test_pages_that_go_in_circles_end(client_of: ClientOf) -> None:
    with pytest.raises(errors.RunPodError, match="read already"):
        client_of(lambda request: _pods("a", pagination={"nextCursor": "again"})).list_pods()


# --------------------------------------------------------------------------------------------------
# Quotas


def test_a_used_up_quota_is_waited_for_before_the_next_request(client_of: ClientOf, clock: Clock) -> None:
    used_up = {"ratelimit": '"minute";r=0;t=12, "hour";r=2800;t=1812'}
    script = Script(httpx.Response(204, headers=used_up), httpx.Response(204), httpx.Response(204))
    client = client_of(script)
    client.delete_pod("a")
    assert clock.slept == []
    client.delete_pod("b")
    client.delete_pod("c")
    assert clock.slept == [12.0]


def test_a_quota_by_the_hour_is_waited_for_within_bounds(client_of: ClientOf, clock: Clock) -> None:
    used_up = {"ratelimit": '"minute";r=50;t=3, "hour";t=1812;r=0'}
    client = client_of(Script(httpx.Response(204, headers=used_up), httpx.Response(204)))
    client.delete_pod("a")
    client.delete_pod("b")
    assert clock.slept == [60.0]


@pytest.mark.parametrize("header", ["", "nonsense", '"minute";r=1;t=12', '"minute";r=0', '"minute";r=0;t=x'])
def test_a_quota_that_is_not_used_up_or_not_told_is_no_reason_to_wait(
    header: str, client_of: ClientOf, clock: Clock
) -> None:
    client = client_of(lambda request: httpx.Response(204, headers={"ratelimit": header}))
    client.delete_pod("a")
    client.delete_pod("b")
    assert clock.slept == []


def test_a_wait_that_is_too_long_is_left_to_the_caller(client_of: ClientOf, clock: Clock) -> None:
    script = Script(problem(429, "rate limit exceeded for the day window", headers={"retry-after": "3600"}))
    with pytest.raises(errors.RateLimited, match="day window") as caught:
        client_of(script).list_pods()
    assert caught.value.retry_after_s == 3600
    assert clock.slept == []


# --------------------------------------------------------------------------------------------------
# The key, the address


def test_the_key_is_in_no_message_and_no_log(client_of: ClientOf, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f"the key {CANARY} is not known"
    failures: list[Answer] = [
        problem(401, echo, errors=[echo]),
        httpx.Response(403, text=echo),
        httpx.ReadTimeout(echo),
        problem(500, echo),
    ]
    for failure in failures:
        client = client_of(Script(failure), attempts=1)
        assert CANARY not in repr(client)
        assert CANARY not in repr(vars(client))
        with pytest.raises(errors.RunPodError) as caught:
            client.get_pod("p")
        assert "is not known" in str(caught.value)
        assert CANARY not in repr(caught.value) + repr(vars(caught.value))
        stack = "".join(traceback.format_exception(caught.value))
        # What httpx itself was told to say in this test.
        assert CANARY not in stack.replace(f"ReadTimeout: {echo}", "")
    client = client_of(lambda request: httpx.Response(200, text=f'data: {{"line": "{CANARY}"}}\n\n'))
    assert client.pod_logs("p") == ["[the key]"]
    assert caplog.records
    assert CANARY not in caplog.text


@pytest.mark.parametrize("key", ["rpa_secret\n", "rpa_sécret", "rpa secret", ""])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ValueError, match="RUNPOD_API_KEY") as caught:
        RunPodClient(key)
    assert "cret" not in str(caught.value)


def test_the_environment_says_which_key_and_where() -> None:
    with RunPodClient.from_environment({"RUNPOD_API_KEY": f" {CANARY}\n"}) as client:
        assert client.base_url == API_URL
    settings = {"RUNPOD_API_KEY": CANARY, "RUNPOD_API_URL": "http://127.0.0.1:9/v2/"}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"id": str(request.url)}))
    with RunPodClient.from_environment(settings, transport=transport) as client:
        pod = client.get_pod("../clusters?x")
    assert pod is not None
    assert pod.id == "http://127.0.0.1:9/v2/pods/..%2Fclusters%3Fx"


def test_what_the_environment_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="RUNPOD_API_KEY is not set"):
        RunPodClient.from_environment({})
    for wrong in ("api.runpod.io/v2", "ftp://api.runpod.io", "http://"):
        with pytest.raises(ValueError, match="RUNPOD_API_URL"):
            RunPodClient.from_environment({"RUNPOD_API_KEY": CANARY, "RUNPOD_API_URL": wrong})


# --------------------------------------------------------------------------------------------------
# Catalog and bills


def test_what_is_free_is_noted_with_the_cloud_it_was_asked_for(client_of: ClientOf) -> None:
    client = client_of(lambda request: httpx.Response(200, json={"gpus": [{"id": "g", "memory": 24}]}))
    assert [line.asked_cloud for line in client.gpu_types(cloud="COMMUNITY")] == ["COMMUNITY"]


def test_a_bill_is_asked_for_in_utc(client_of: ClientOf) -> None:
    script = Script(httpx.Response(200, json={"records": [], "metadata": {}}))
    client = client_of(script)
    assert client.billing_pods(datetime.fromisoformat("2026-06-01T02:00:00+02:00")) == []
    assert script.requests[0].url.params["startTime"] == "2026-06-01T00:00:00Z"
    with pytest.raises(ValueError, match="time zone"):
        client.billing_pods(datetime(2026, 6, 1, tzinfo=UTC).replace(tzinfo=None))
