"""schemathesis reads the OpenAPI page and asks what it makes of it, valid and not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from standins.served_script import Served

from nanochat.serving.gate import Limits

pytestmark = pytest.mark.timeout(300)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    unsupported_method,
    ignored_auth,
]
OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ping"),
    ("GET", "/metrics"),
]
# Each with requests that are valid by the page, and where there is anything to get wrong, with others.
VALID, INVALID = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [
    pytest.param(method, path, mode, id=f"{path}-{mode.value}")
    for method, path in OPERATIONS
    for mode in (VALID, INVALID)
    if mode is VALID or method == "POST" or "{" in path
]
EXAMPLES = {"POST": 40, "GET": 5}


@pytest.fixture
def keyed(served: Callable[..., Served]) -> Served:
    # What is read is short: whatever the page allows is answered, and within the test's time.
    return served(api_keys=("key",), limits=Limits(body_bytes=1 << 16), max_tokens=8)


def test_the_page_names_every_route_of_the_interface(keyed: Served) -> None:
    page = schemathesis.openapi.from_url(f"{keyed.url}/openapi.json").raw_schema
    found = {(method.upper(), path) for path, methods in page["paths"].items() for method in methods}
    assert set(OPERATIONS) <= found
    for path in ("/v1/chat/completions", "/v1/completions"):
        answers = page["paths"][path]["post"]["responses"]
        assert set(answers) == {"200", "400", "401", "404", "408", "413", "422", "429", "500", "503"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_no_request_makes_the_server_fail_or_answer_otherwise_than_its_page_says(
    keyed: Served, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    operation = schemathesis.openapi.from_url(f"{keyed.url}/openapi.json")[path][method]
    statuses = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES[method],
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        # A name that is served, else nothing but 404 would be seen.
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        answer = case.call(headers={"Authorization": "Bearer key"}, timeout=30)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)

    ask()
    if mode is VALID and method == "POST":
        assert {200, 400} <= statuses  # answered, and refused by the engine's own limits
    if mode is INVALID and method == "POST":
        assert 422 in statuses
