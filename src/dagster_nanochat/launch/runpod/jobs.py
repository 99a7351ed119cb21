"""A client of the jobs of one serverless endpoint.

It asks at the URLs that the endpoint itself names. RunPod forgets a finished job after half an hour.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from dagster_nanochat.launch.runpod.endpoint_models import (
    Endpoint,
    Health,
    Job,
    JobRequest,
    JobStream,
    RequestUrls,
)
from dagster_nanochat.launch.runpod.errors import MaybeCreated, RunPodError
from dagster_nanochat.launch.runpod.exchange import Exchange


class JobClient(Exchange):
    """Every method raises a `RunPodError` of the class that says what to do."""

    def __init__(self, api_key: str, urls: RequestUrls, **options: Any) -> None:
        """options: those of `Exchange`. Raises ValueError."""
        super().__init__(api_key, base_url=urls.run, **options)
        self._urls = urls

    def run(self, request: JobRequest) -> Job:
        """Queue a job. One whose outcome nobody knows raises `MaybeCreated`: it is not sent again, and
        ends by its policy."""
        try:
            return self._create(self._urls.run, request.body(), Job)
        except MaybeCreated as error:
            ttl_s = request.policy.ttl / 1000
            raise MaybeCreated(
                error.what,
                error.problem,
                advice=f"The job may have been queued all the same; RunPod drops it after {ttl_s:.0f} s",
            ) from error

    def status(self, job_id: str) -> Job:
        """Raises `NotFound` once RunPod has forgotten it."""
        return self._job("GET", self._urls.status, job_id)

    def stream(self, job_id: str) -> JobStream:
        """What it has said since it was asked last; nothing is told twice."""
        url = _of(self._urls.stream, job_id)
        return self._read(JobStream, self._json("GET", url), f"GET {url}")

    def cancel(self, job_id: str) -> Job:
        """Ask for its end. One that has ended stays as it is."""
        return self._job("POST", self._urls.cancel, job_id)

    def health(self) -> Health:
        """How many workers there are, and in which state."""
        url = self._urls.health
        return self._read(Health, self._json("GET", url), f"GET {url}")

    def _job(self, method: str, template: str, job_id: str) -> Job:
        url = _of(template, job_id)
        return self._read(Job, self._json(method, url), f"{method} {url}")


def urls_of(endpoint: Endpoint) -> RequestUrls:
    """Raises RunPodError where the endpoint has no queue."""
    try:
        return RequestUrls.model_validate(endpoint.request_urls)
    except ValidationError as error:
        raise RunPodError(
            f"endpoint {endpoint.name} ({endpoint.id}) has no queue to send a job to; remove it in RunPod's "
            "console, and deploy anew"
        ) from error


def _of(template: str, job_id: str) -> str:
    return template.replace("{job_id}", job_id)
