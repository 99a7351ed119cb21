"""The whole graph at an emulated RunPod, as `nanochat quickstart` runs it: trained on pods, answered by the
real worker of an endpoint."""

from __future__ import annotations

import re
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from emulators.runpod import Emulator, find_spec
from standins import s3
from standins.serverless_sdk import sdk_image
from standins.waiting import wait_for

from dagster_nanochat import endpoints
from dagster_nanochat.quickstart import run_quickstart
from nanochat.store.receipts import current_receipt

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(s3.program() is None, reason="versitygw, the S3 server of tests, is not installed"),
    pytest.mark.skipif(find_spec() is None, reason="RunPod's OpenAPI file is not there"),
]


def test_a_quickstart_ends_with_an_answer_from_the_endpoint_and_says_so(
    project: SimpleNamespace,
    runpod: Emulator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = runpod.images.pop("*")
    runpod.images.update({"*/nanochat-serverless@*": sdk_image(), "*": training})
    runpod.registry.publish("nanochat-serverless", "latest")
    address = urlsplit(runpod.registry_url).netloc
    monkeypatch.setenv("NANOCHAT_SERVERLESS_IMAGE", f"{address}/nanochat-serverless:latest")

    assert run_quickstart("tiny", force="", question="Who are you?") == 0
    *_, endpoint, source = (lines := capsys.readouterr().out.splitlines())[:-5]
    answer = lines[-1]
    assert re.match(r"endpoint: nanochat-tiny \(\w+\), 0 to 2 workers, at most \$\d", endpoint)
    assert endpoint.endswith("remove it with `nanochat endpoints rm tiny`")
    assert re.match(r"the answer comes from the serverless endpoint nanochat-tiny \(\w+\): \d", source)
    (worker,) = runpod.workers()
    receipt = current_receipt(project.store, "tiny", "sft")
    assert receipt is not None
    assert worker.env["NANOCHAT_RECEIPT_SHA256"] == receipt.digest()
    jobs = [request for request in runpod.requests if request["path"].endswith("/run")]
    assert len(jobs) == 2  # the smoke prompt and the question
    assert re.match(r"answer: \S", answer)

    assert endpoints.remove("tiny") == 0
    wait_for(lambda: not any(worker.is_there for worker in runpod.workers()))
