"""RunPod's serverless worker: the SDK's loop over `nanochat.serving.worker`.

    NANOCHAT_MODEL=d12 NANOCHAT_STORE=s3://… python handler.py

With NANOCHAT_WORKER=http it is a load-balancer endpoint's worker instead: OpenAI's API on PORT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from typing import Any

# The SDK's debug level writes questions and answers into the log; it is read when the SDK is imported.
os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")

from nanochat.serving.worker import SettingsError, Worker, WorkerSettings
from nanochat.store import StoreError


def main() -> int:
    try:
        worker = Worker(WorkerSettings.from_environment())
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if worker.settings.mode == "http":
        try:
            worker.serve()
        except (ValueError, StoreError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    import runpod

    # Before the first job is taken, and the platform is told the reason where it fails.
    def model_answers() -> None:
        worker.start()

    # The SDK looks for a function that is an asynchronous generator: a method of an object will not do.
    async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
        async for said in worker.answer(job["input"]):
            yield said

    def concurrency(current: int) -> int:
        return worker.settings.max_rows

    if "RUNPOD_WEBHOOK_GET_JOB" in os.environ:
        runpod.serverless.register_fitness_check(model_answers)
    else:
        # Tried by hand (--rp_serve_api): the SDK makes no checks then.
        model_answers()
    runpod.serverless.start(
        {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": concurrency}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
