"""A model on a serverless endpoint: created or changed, its release waited for and tried, and taken back
where it fails.

An endpoint is found by its name, and says in its environment which store it is of: one of another store is
left alone. What has answered the smoke prompt is recorded in the store. A release that has not is not left in
place, whatever ends the deployment: the endpoint gets its last configuration back, or, where it is new, no
workers.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from dagster_nanochat.launch.runpod.asking import Answer, Pause, Say, ask
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings
from dagster_nanochat.launch.runpod.containers import STORE_SECRETS, store_access
from dagster_nanochat.launch.runpod.endpoint_models import (
    Endpoint,
    EndpointChange,
    EndpointGpu,
    EndpointRequest,
    QueueDelay,
    Worker,
    WorkerLimits,
)
from dagster_nanochat.launch.runpod.errors import MaybeCreated, RunPodError
from dagster_nanochat.launch.runpod.pools import Pool
from nanochat.failures import AttemptFailed, Failure
from nanochat.store import ObjectStore
from nanochat.store.documents import Document
from nanochat.store.layout import endpoint_key
from nanochat.store.receipts import Receipt

# The worker's own variables are those of `nanochat.serving.worker`. This one says whose the endpoint is.
STORE_OF_ENDPOINT_ENV = "NANOCHAT_ENDPOINT_STORE"
RECEIPT_ENV = "NANOCHAT_RECEIPT_SHA256"
SMOKE_QUESTION = "What is your name?"
SMOKE_TOKENS = 32
_POLL_S = 2.0
# An endpoint whose creation was answered with an error appears in the list a little later.
_LOOK_FOR_LOST_S = (1.0, 2.0, 4.0, 8.0)
_TAKEN_BACK_WITHIN_S = 120.0


class EndpointRecord(Document):
    """Stored as `endpoints/<model>.json` when a release has answered the smoke prompt. image: reference with
    digest. receipt: digest of the fine-tuning's receipt. release: RunPod's number of it.
    usd_per_h: of one worker while it is there, at most; None where no price is told."""

    schema_name: ClassVar[str] = "nanochat.endpoint"

    model: str
    name: str
    id: str
    image: str
    receipt: str
    release: int | None
    pools: tuple[str, ...]
    usd_per_h: float | None
    min_workers: int
    max_workers: int
    idle_timeout_s: int
    proven_at: datetime.datetime


def read_endpoint(store: ObjectStore, model: str) -> EndpointRecord | None:
    """The endpoint that serves the model; None where it was never deployed, or removed."""
    found = EndpointRecord.read_with_etag(store, endpoint_key(model))
    return found[0] if found else None


def write_endpoint(store: ObjectStore, record: EndpointRecord) -> None:
    """Put it in, or in place of what was known of it before."""
    store.put(endpoint_key(record.model), record.to_bytes())


def forget_endpoint(store: ObjectStore, model: str) -> None:
    store.delete(endpoint_key(model))


def endpoint_records(store: ObjectStore) -> list[EndpointRecord]:
    """Those of all models."""
    return [
        EndpointRecord.read(store, info.key) for info in store.list(endpoint_key("").removesuffix(".json"))
    ]


def endpoint_name(model: str) -> str:
    return f"nanochat-{model}"


def endpoint_url(endpoint_id: str) -> str:
    return f"https://console.runpod.io/serverless/user/endpoint/{endpoint_id}"


def always_paid(client: RunPodClient, store: ObjectStore) -> Iterator[str]:
    """A sentence for each of the store's endpoints that costs money while nobody asks it. Raises
    RunPodError."""
    names = {record.id: record.model for record in endpoint_records(store)}
    for endpoint in client.list_endpoints():
        if store_of(endpoint) == store.url and endpoint.workers.min:
            yield (
                f"endpoint {endpoint.name} ({endpoint.id}) always has {endpoint.workers.min} workers, and "
                f"they are always paid for: set min_workers to 0 in serverless_endpoint's config, or "
                f"`nanochat endpoints rm {names.get(endpoint.id, endpoint.id)}`"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How many workers, and when. queue_delay_s: a job's waiting that brings another one."""

    min_workers: int
    max_workers: int
    idle_timeout_s: int
    queue_delay_s: float


def endpoint_request(
    store: ObjectStore,
    receipt: Receipt,
    *,
    name: str,
    model: str,
    image: str,
    baked: bool,
    pools: list[Pool],
    gpu_count: int,
    scale: Scale,
    settings: RunPodSettings,
    execution_s: float,
    environment: Mapping[str, str],
) -> EndpointRequest:
    """What the endpoint is to be. baked: the weights are in the image; else a worker pulls them from the
    store, whose credentials it is told by the names of RunPod's secrets."""
    weights: dict[str, str] = {}
    if not baked:
        weights = {
            **store_access(environment, STORE_SECRETS),
            "NANOCHAT_STORE": store.url,
            "NANOCHAT_MODEL": model,
            "NANOCHAT_SOURCE": "sft" if receipt.stage == "sft" else "mid",
            "NANOCHAT_FINGERPRINT": receipt.fingerprint,
        }
    return EndpointRequest(
        name=name,
        image=image,
        env={
            **weights,
            **settings.env_variables,
            RECEIPT_ENV: receipt.digest(),
            STORE_OF_ENDPOINT_ENV: store.url,
        },
        disk=settings.container_disk_gb,
        gpu=EndpointGpu(
            pools=tuple(pool.name for pool in pools),
            count=gpu_count,
            min_cuda_version=settings.min_cuda_version,
        ),
        workers=WorkerLimits(min=scale.min_workers, max=scale.max_workers, idle_timeout=scale.idle_timeout_s),
        scaling=QueueDelay(queue_delay=scale.queue_delay_s),
        timeout=round(1000 * execution_s),
        data_center_ids=settings.data_center_ids or None,
    )


def find_endpoint(client: RunPodClient, name: str, store: ObjectStore) -> Endpoint | None:
    """The store's endpoint of that name. Raises AttemptFailed where it is somebody else's, or one of several,
    and RunPodError."""
    found = [endpoint for endpoint in client.list_endpoints() if endpoint.name == name]
    if len(found) > 1:
        raise AttemptFailed(
            Failure.BAD_REQUEST,
            f"RunPod has {len(found)} endpoints called {name}: {', '.join(one.id for one in found)}. Remove "
            "all but one, in RunPod's console or with `nanochat endpoints rm ID`",
        )
    for endpoint in found:
        if store_of(endpoint) != store.url:
            raise AttemptFailed(
                Failure.BAD_REQUEST,
                f"endpoint {name} ({endpoint.id}) is of {store_of(endpoint) or 'nobody that is known'}, not "
                f"of {store.url}: give this one another name (config `name` of serverless_endpoint), or "
                "remove that one",
            )
    return found[0] if found else None


def store_of(endpoint: Endpoint) -> str | None:
    return (endpoint.env or {}).get(STORE_OF_ENDPOINT_ENV)


Did = Literal["created", "updated", "unchanged"]


class StaleWorkers(AttemptFailed):
    """Workers of an older release do not leave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployed:
    """smoke: the answer that has proven the release; None where that was proven before."""

    endpoint: Endpoint
    release: int | None
    did: Did
    smoke: Answer | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """release_s: how long all workers may take to run the new release. smoke_s: how long its first answer may
    take, a worker's start included."""

    client: RunPodClient
    store: ObjectStore
    say: Say
    pause: Pause
    release_s: float
    smoke_s: float

    def deploy(self, wanted: EndpointRequest, proven: EndpointRecord | None) -> Deployed:
        """Bring the endpoint to `wanted`, and see it answer.

        proven: what the store knows of it. Raises AttemptFailed and RunPodError; then the endpoint is as it
        was before, but where old workers do not leave.
        """
        found = find_endpoint(self.client, wanted.name, self.store)
        did: Did
        if found is None:
            self.say(f"endpoint {wanted.name}: there is none, it is created")
            endpoint, did = self._create(wanted), "created"
        elif changes := differences(found, wanted):
            self.say(f"endpoint {wanted.name} ({found.id}) is changed: {', '.join(changes)}")
            endpoint, did = self.client.update_endpoint(found.id, wanted.as_change()), "updated"
        else:
            endpoint, did = found, "unchanged"
        try:
            release = self._wait_for_release(endpoint, self.release_s)
            if did == "unchanged" and proven and (proven.id, proven.release) == (endpoint.id, release):
                self.say(f"endpoint {wanted.name} runs release {release} already, and has answered")
                return Deployed(endpoint=endpoint, release=release, did=did, smoke=None)
            answer = self._try(endpoint, wanted)
        except StaleWorkers:
            raise  # going back would need those workers to leave, too
        except BaseException as error:
            undone = self._take_back(endpoint, found, did, error)
            if isinstance(error, AttemptFailed):
                message = f"the smoke prompt failed: {error.message.rstrip('.')}. {undone}"
                raise AttemptFailed(error.failure, message) from error
            raise
        return Deployed(endpoint=endpoint, release=release, did=did, smoke=answer)

    # ----------------------------------------------------------------------------------------------

    def _create(self, wanted: EndpointRequest) -> Endpoint:
        """Raises AttemptFailed where nobody knows whether there is one now."""
        try:
            return self.client.create_endpoint(wanted)
        except MaybeCreated as doubt:
            for pause_s in _LOOK_FOR_LOST_S:
                self.pause(pause_s)
                found = find_endpoint(self.client, wanted.name, self.store)
                if found is not None:
                    return found
            raise AttemptFailed(
                Failure.LOST,
                f"{doubt.what}: {doubt.problem}. No endpoint {wanted.name} has appeared; run it again, it is "
                "looked for by its name first",
            ) from doubt

    def _wait_for_release(self, endpoint: Endpoint, within_s: float) -> int | None:
        """Returns RunPod's number of the release that every worker runs. Raises AttemptFailed."""
        deadline = time.monotonic() + within_s
        said = ""
        while True:
            releases = self.client.endpoint_releases(endpoint.id)
            told = self.client.endpoint_workers(endpoint.id)
            stale = [worker for worker in told.workers if worker.is_stale]
            if not stale and not releases.rollout.in_progress:
                return releases.endpoint_version
            if time.monotonic() > deadline:
                raise StaleWorkers(
                    Failure.DEADLINE,
                    f"release {releases.endpoint_version} of endpoint {endpoint.name} is not everywhere "
                    f"after {within_s:.0f} s: {_named(stale)}. Until that ends, an answer may come from an "
                    f"old release: end the worker in RunPod's console ({endpoint_url(endpoint.id)}), and run "
                    "it again",
                )
            state = f"release {releases.endpoint_version}: {_named(stale)}"
            if state != said:
                self.say(f"endpoint {endpoint.name}: {state}")
                said = state
            self.pause(_POLL_S)

    def _try(self, endpoint: Endpoint, wanted: EndpointRequest) -> Answer:
        """Raises AttemptFailed where the release does not answer, or not with the weights it should have."""
        assert wanted.env is not None
        question = {"question": SMOKE_QUESTION, "max_tokens": SMOKE_TOKENS, "temperature": 0}
        answer = ask(self.client, endpoint, question, within_s=self.smoke_s, pause=self.pause, say=self.say)
        if answer.receipt_sha256 != wanted.env[RECEIPT_ENV]:
            raise AttemptFailed(
                Failure.FAILED,
                f"it answers with the weights of receipt {str(answer.receipt_sha256)[:12]}, not of "
                f"{wanted.env[RECEIPT_ENV][:12]}",
            )
        self.say(f"endpoint {endpoint.name} answers: {answer.text}")
        return answer

    def _take_back(self, endpoint: Endpoint, before: Endpoint | None, did: Did, why: BaseException) -> str:
        """Returns what was done. Where somebody ends the run, it is only asked for, not waited for."""
        try:
            if did == "unchanged":
                done = f"Endpoint {endpoint.name} had this release before, and is left as it is"
            elif before is None:
                none = EndpointChange(workers=WorkerLimits(min=0, max=0))
                self.client.update_endpoint(endpoint.id, none)
                done = f"Endpoint {endpoint.name} has no release to go back to, and is left with 0 workers"
            else:
                self.client.update_endpoint(endpoint.id, as_change(before))
                done = f"Endpoint {endpoint.name} was rolled back to {before.image}"
                if isinstance(why, AttemptFailed):
                    self._wait_for_release(endpoint, _TAKEN_BACK_WITHIN_S)
        except (RunPodError, AttemptFailed) as error:
            done = (
                f"Endpoint {endpoint.name} could not be rolled back ({error}): look at it in RunPod's "
                f"console, {endpoint_url(endpoint.id)}"
            )
        self.say(done)
        return done


def as_change(endpoint: Endpoint) -> EndpointChange:
    """An endpoint's whole configuration as it is told, to be given back to it."""
    gpu, scaling = endpoint.gpu, endpoint.scaling
    return EndpointChange(
        image=endpoint.image,
        env=endpoint.env,
        disk=endpoint.disk,
        gpu=EndpointGpu(pools=gpu.pools, count=gpu.count, min_cuda_version=gpu.min_cuda_version)
        if gpu and gpu.pools
        else None,
        workers=WorkerLimits(
            min=endpoint.workers.min,
            max=endpoint.workers.max,
            idle_timeout=endpoint.workers.idle_timeout,
        ),
        scaling=QueueDelay(queue_delay=scaling.queue_delay) if scaling and scaling.queue_delay else None,
        timeout=endpoint.timeout,
        data_center_ids=endpoint.data_center_ids,
    )


def differences(endpoint: Endpoint, wanted: EndpointRequest) -> list[str]:
    """What of `wanted` the endpoint has not, by name."""
    present = as_change(endpoint)
    return [
        name
        for name in EndpointChange.model_fields
        if getattr(wanted, name) is not None and getattr(wanted, name) != getattr(present, name)
    ]


def remove_endpoint(
    client: RunPodClient, endpoint_id: str, *, within_s: float, pause: Pause = time.sleep
) -> None:
    """Delete it, and see that it is gone. Raises TimeoutError and RunPodError."""
    deadline = time.monotonic() + within_s
    while True:
        client.delete_endpoint(endpoint_id)
        if client.get_endpoint(endpoint_id) is None:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"endpoint {endpoint_id} will not go: remove it in RunPod's console, "
                f"{endpoint_url(endpoint_id)}"
            )
        pause(_POLL_S)


def _named(stale: list[Worker]) -> str:
    names = ", ".join(f"{worker.id} ({worker.status}, release {worker.version})" for worker in stale)
    return f"old workers are there: {names}" if names else "workers are being replaced"
