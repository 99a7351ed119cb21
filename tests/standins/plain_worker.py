"""A worker of an endpoint without SDK and model: it takes jobs and tells answers as the SDK's worker does, in
the form of `nanochat.serving.jobs`, and starts in a moment.

Run as a program it does what WORKER_DOES says: it answers, errs, says nothing, sleeps, or serves weights of
a receipt that is not the endpoint's.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

# The question that no worker answers.
SLEEP = "Are you asleep?"


def image(does: str = "answers") -> Any:
    """For the emulator."""
    from emulators.runpod import Image

    return Image(
        entrypoint=(sys.executable, "-S", "-E", str(Path(__file__).resolve())),
        environment={"WORKER_DOES": does},
    )


def main() -> None:
    while True:
        with _exchange(os.environ["RUNPOD_WEBHOOK_GET_JOB"], os.environ["RUNPOD_POD_ID"]) as response:
            job = json.load(response) if response.status == 200 else None
        if job:
            url = os.environ["RUNPOD_WEBHOOK_POST_OUTPUT"].replace(
                "$RUNPOD_POD_ID", os.environ["RUNPOD_POD_ID"]
            )
            _exchange(url, job["id"], json.dumps(_answer(job["input"])).encode()).close()


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    does = os.environ["WORKER_DOES"]
    if does == "errs":
        return {"error": json.dumps({"status": 400, "message": "I do not want to"})}
    question = asked["messages"][-1]["content"] if "messages" in asked else asked["question"]
    if does == "sleeps" or question == SLEEP:
        time.sleep(3600)
    receipt = os.environ["NANOCHAT_RECEIPT_SHA256"] if does != "has other weights" else "0" * 64
    said = {
        "text": "" if does == "says nothing" else f"You asked: {question}",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
        "receipt_sha256": receipt,
    }
    return {"output": [said]}


def _exchange(url: str, id: str, body: bytes | None = None) -> Any:
    headers = {"Authorization": os.environ["RUNPOD_AI_API_KEY"]}
    request = urllib.request.Request(url.replace("$ID", id), data=body, headers=headers)
    return urllib.request.urlopen(request, timeout=60)


if __name__ == "__main__":
    main()
