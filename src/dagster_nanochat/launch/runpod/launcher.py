"""The RunPod launcher: an attempt on a rented pod, asked for once and given back for certain.

A pod is named after its attempt, and the ledger of the store has an entry for it before it is asked
for: so whoever finds a pod knows whose it is, and a pod that is in no ledger of this store is left
alone. RunPod's word that a pod runs says nothing (runpod.md, section 2), so what is relied on is that
its supervisor renews the attempt's lease; RunPod is asked now and then whether the pod is still there.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from dagster_nanochat.launch.base import THREADS_ENV, Handle, Offer, Patience, Request, number_setting
from dagster_nanochat.launch.images import TRAINING_IMAGE_ENV, record_image, recorded_image
from dagster_nanochat.launch.registry import ImageError, resolve_image
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings, disk_gb, resolve_settings, variable
from dagster_nanochat.launch.runpod.ending import CONSOLE_URL, end_pods, pod_token
from dagster_nanochat.launch.runpod.errors import (
    Forbidden,
    InsufficientBalance,
    Invalid,
    MaybeCreated,
    NoCapacity,
    NotFound,
    RateLimited,
    RuleViolation,
    RunPodError,
    Unauthorized,
    Unavailable,
)
from dagster_nanochat.launch.runpod.models import (
    GpuRequest,
    Mounts,
    PersistentMount,
    Pod,
    PodRequest,
    PodStatus,
)
from dagster_nanochat.launch.runpod.offers import RunPodOffer, find_offers
from nanochat import pod as in_pod
from nanochat.events import EventStream, ending_of
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import Hardware, Recipe, parameters
from nanochat.store import ObjectStore
from nanochat.store.layout import attempt_prefix
from nanochat.store.leases import machine_name, utc_now
from nanochat.store.ledger import LedgerEntry, change_entry, read_entry, user_name, write_entry
from nanochat.training.job import JobHardware, Rented, TrainingJob

MAX_PODS_ENV = "NANOCHAT_MAX_PODS"
DEFAULT_MAX_PODS = 4
MAX_MACHINES = 4
# A large image takes minutes to pull, and says nothing meanwhile.
PATIENCE = Patience(ready_s=1200.0, silent_s=120.0, capacity_s=3600.0)
# Threads of a training process for what the CPU does beside a GPU.
THREADS = 8

# Kept as secrets at RunPod under these names; a pod is told no credential in plain words.
STORE_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Of these, the ones that are set where the launcher runs.
OTHER_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
_PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "HF_ENDPOINT")

_DEAD = (PodStatus.EXITED, PodStatus.ERROR, PodStatus.TERMINATED)
# What the host's log says of a container that will never start here (runpod.md, sections 2 and 6).
_HOPELESS = re.compile(
    r"failed to pull image|image pull: .*(not found|denied|unauthorized)|error starting container"
    r"|cannot be mapped to a host ID|layer does not exist",
    re.IGNORECASE,
)
_LOOK_EVERY_S = 20.0
_LIST_EVERY_S = 5.0
_CREATIONS = 3
# A pod whose creation was answered with an error appears in the list a little later.
_LOOK_FOR_LOST_S = (1.0, 2.0, 4.0, 8.0)
# What a machine may need beyond its deadline: to start, and to end itself.
_LIFETIME_MARGIN_S = 1800.0


class RunPodLauncher:
    """Runs attempts on pods. Raises AttemptFailed where RunPod or the settings do not let it."""

    name = "runpod"
    max_machines = MAX_MACHINES

    def __init__(
        self,
        store: ObjectStore,
        client: RunPodClient,
        settings: RunPodSettings,
        *,
        image: str | None,
        patience: Patience,
        max_pods: int = DEFAULT_MAX_PODS,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """image: reference with digest, where the settings name none."""
        self._store = store
        self._client = client
        self._settings = settings
        self._image = settings.image_name or image
        self.patience: Patience | None = patience
        self._environment = environment
        self._max_pods = max_pods
        self._listed: tuple[float, list[Pod]] = (-math.inf, [])
        self._looked: dict[str, tuple[float, bool]] = {}

    # ----------------------------------------------------------------------------------------------
    # Before money

    def offers(self, request: Request, flops: float | None = None) -> list[Offer]:
        if not self._store.url.startswith("s3://"):
            raise AttemptFailed(
                Failure.BAD_REQUEST,
                f"a pod cannot reach the store {self._store.url}: set NANOCHAT_STORE=s3://bucket/prefix",
            )
        if self._settings.nodes > 1:
            raise AttemptFailed(
                Failure.BAD_REQUEST,
                f"{variable('nodes')}={self._settings.nodes}: this version trains a stage on one machine; "
                f"unset it and ask for more GPUs ({variable('gpu_count')})",
            )
        try:
            return list(find_offers(self._client, request, self._settings, flops))
        except RunPodError as error:
            raise _explained(error) from error

    def hardware(self, wanted: Hardware, offer: Offer) -> JobHardware:
        assert isinstance(offer, RunPodOffer)
        return JobHardware(
            processes=offer.gpu_count,
            threads=number_setting(THREADS_ENV, default=THREADS),
            device_batch_rows=wanted.device_batch_rows,
        )

    def slots(self) -> list[str]:
        return [f"slots/runpod/{number}.json" for number in range(self._max_pods)]

    def rent(self, offer: Offer, max_usd: float) -> Rented | None:
        assert isinstance(offer, RunPodOffer)
        limits = (max_usd, self._settings.max_usd)
        return Rented(
            provider=self.name,
            offer=offer.name,
            usd_per_h=offer.price_usd_per_h,
            rented_at=utc_now(),
            max_usd=min(limit for limit in limits if limit is not None),
            gpus=offer.gpu_count,
            min_gpu_memory_gib=self._settings.min_memory_gib or 0.0,
            min_cuda=self._settings.min_cuda_version,
        )

    def image(self) -> str | None:
        named = self._environment.get(TRAINING_IMAGE_ENV)
        if self._image is None and named:
            try:
                self._image = record_image(self._store, "training", resolve_image(named)).reference
            except ImageError as error:
                raise AttemptFailed(Failure.BAD_REQUEST, str(error)) from error
        if self._image is None:
            raise AttemptFailed(
                Failure.BAD_REQUEST,
                f"no training image is known: set {TRAINING_IMAGE_ENV} to one that `make images` has pushed",
            )
        return self._image

    # ----------------------------------------------------------------------------------------------
    # Launching

    def launch(self, job: TrainingJob, offer: Offer) -> Handle:
        assert isinstance(offer, RunPodOffer)
        self._require_room()
        self._require_secrets()
        if self._settings.deadline_h:
            deadline_s = min(job.deadline_s, 3600 * self._settings.deadline_h)
            job = job.model_copy(update={"deadline_s": deadline_s})
        request = self._request(job, offer)
        self._store.put(f"{job.attempt_prefix}/job.json", job.to_bytes())
        entry = LedgerEntry(
            token=job.token,
            provider=self.name,
            model=job.model,
            stage=job.stage,
            prefix=job.prefix,
            offer=offer.name,
            usd_per_h=offer.price_usd_per_h,
            user=user_name(),
            host=machine_name(),
            asked_at=utc_now(),
            deadline_at=utc_now() + timedelta(seconds=job.deadline_s + _LIFETIME_MARGIN_S),
        )
        earlier = read_entry(self._store, job.token)
        if earlier is not None:
            # An offer that was refused. What may have been made on it all the same is no less in doubt.
            kept = {"asked_at": earlier.asked_at, "in_doubt": earlier.in_doubt, "twins": earlier.twins}
            entry = entry.model_copy(
                update={**kept, "usd_per_h": max(entry.usd_per_h, earlier.usd_per_h)}
                if earlier.in_doubt
                else {"twins": earlier.twins}
            )
        write_entry(self._store, entry)
        try:
            pod = self._create(request, job.token)
            self._note_machine(job.token, pod)
        except BaseException as error:
            # Whatever went wrong, an interrupt too: if there is a pod, nobody else will end it.
            outcome = error.failure if isinstance(error, AttemptFailed) else Failure.CANCELLED
            try:
                self._end_token(job.token, str(outcome))
            except TimeoutError as stays:
                raise AttemptFailed(Failure.LOST, f"{error}. {stays}") from error
            raise
        return self._handle(job.token, pod)

    def _handle(self, token: str, pod: Pod) -> Handle:
        return Handle(launcher=self.name, token=token, id=pod.id, url=CONSOLE_URL.format(pod.id))

    def _note_machine(self, token: str, pod: Pod) -> None:
        change_entry(
            self._store,
            token,
            lambda entry: {
                "machine": pod.id,
                "url": CONSOLE_URL.format(pod.id),
                "usd_per_h": pod.usd_per_h or entry.usd_per_h,
                # The sweeper may have closed it meanwhile.
                **({} if entry.open else {"ended_at": None, "outcome": "", "billed_usd": None}),
            },
        )

    def _require_room(self) -> None:
        """Pods whose orchestrator has died hold no slot any more, and count."""
        living = [token for token, pod in self._ours() if pod.status not in _DEAD]
        if len(living) >= self._max_pods:
            raise AttemptFailed(
                Failure.NO_CAPACITY,
                f"{len(living)} pods of this store are running, as many as {MAX_PODS_ENV} allows",
            )

    def _secrets(self) -> list[str]:
        return [*STORE_SECRETS, *(name for name in OTHER_SECRETS if self._environment.get(name))]

    def missing_secrets(self) -> list[str]:
        """Names of secrets that a pod needs and RunPod does not have. Raises RunPodError."""
        there = self._client.secrets()
        return [name for name in self._secrets() if there is not None and name not in there]

    def _require_secrets(self) -> None:
        try:
            missing = self.missing_secrets()
        except RunPodError as error:
            raise _explained(error) from error
        if missing:
            raise AttemptFailed(
                Failure.BAD_REQUEST,
                f"RunPod has no secret {', '.join(missing)}: create it in RunPod's console (Settings, "
                "Secrets) under that name; pods are told no credential in plain words",
            )

    def _request(self, job: TrainingJob, offer: RunPodOffer) -> PodRequest:
        shards = sum(file.size_bytes for file in job.shards)
        settings = self._settings
        disk = settings.container_disk_gb or disk_gb(shards, _parameters(job.recipe))
        volume = settings.volume_disk_gb
        ram = settings.min_ram_gib
        assert job.image is not None
        return PodRequest(
            name=f"nanochat-{job.model}-{job.stage}-{job.token}",
            image=job.image,
            env=self._pod_environment(job),
            disk=disk,
            mounts=Mounts(persistent=PersistentMount(size=volume, path="/workspace")) if volume else None,
            data_center_ids=offer.data_center_ids or None,
            gpu=GpuRequest(
                id=offer.gpu_type_id,
                count=offer.gpu_count,
                min_cuda_version=settings.min_cuda_version,
                min_ram_per_gpu=None if ram is None else max(1, round(ram / offer.gpu_count)),
            ),
            cloud=offer.cloud,
        )

    def _pod_environment(self, job: TrainingJob) -> dict[str, str]:
        pod = f"{self._client.base_url}/pods/${{RUNPOD_POD_ID}}"
        key = "RUNPOD_API_KEY"  # in a pod, a key that RunPod made for it alone
        end = [
            in_pod.EndRequest(method="DELETE", url=pod, bearer=key),
            in_pod.EndRequest(method="POST", url=f"{pod}/action", body={"action": "terminate"}, bearer=key),
        ]
        return {
            **{name: self._environment[name] for name in _PASSED_ON if self._environment.get(name)},
            **{name: f"{{{{ RUNPOD_SECRET_{name} }}}}" for name in self._secrets()},
            **self._settings.env_variables,
            in_pod.STORE_ENV: self._store.url,
            in_pod.JOB_ENV: f"{job.attempt_prefix}/job.json",
            in_pod.END_ENV: in_pod.encode_end(end),
            in_pod.MACHINE_ENV: "RUNPOD_POD_ID",
            in_pod.LIFETIME_ENV: f"{job.deadline_s + _LIFETIME_MARGIN_S:.0f}",
        }

    def _create(self, request: PodRequest, token: str) -> Pod:
        """One pod of that token. Raises AttemptFailed."""
        doubt: RunPodError | None = None
        for _ in range(_CREATIONS):
            try:
                return self._client.create_pod(request)
            except MaybeCreated as error:
                doubt = error
                change_entry(self._store, token, lambda entry: {"in_doubt": True})
                found = self._look_for(token)
                if found is not None:
                    return found
            except RunPodError as error:
                raise _explained(error) from error
        assert doubt is not None
        raise AttemptFailed(Failure.NO_CAPACITY, str(doubt)) from doubt

    def _look_for(self, token: str) -> Pod | None:
        for pause_s in _LOOK_FOR_LOST_S:
            time.sleep(pause_s)
            try:
                for pod in self._pods_of(token):
                    return pod
            except RunPodError:
                continue  # it is looked for again before the attempt is given up
        return None

    # ----------------------------------------------------------------------------------------------
    # Finding

    def find(self, prefix: str) -> Handle | None:
        found = None
        for token, pod in self._ours():
            entry = read_entry(self._store, token)
            if entry is None or entry.prefix != prefix:
                continue
            handle = self._handle(token, pod)
            if pod.status in _DEAD or not entry.open or self._is_over(prefix, token):
                try:
                    self.terminate(handle, entry.outcome)
                except TimeoutError as stays:
                    raise AttemptFailed(Failure.LOST, str(stays)) from stays
            elif entry.machine in (None, pod.id):
                self._note_machine(token, pod)
                found = handle
        return found

    def _is_over(self, prefix: str, token: str) -> bool:
        told = EventStream(self._store, f"{attempt_prefix(prefix, token)}/events.jsonl").all()
        return ending_of(told) is not None

    def _ours(self) -> Iterator[tuple[str, Pod]]:
        """Every pod that is in this store's ledger, with its token. Raises AttemptFailed."""
        if time.monotonic() - self._listed[0] >= _LIST_EVERY_S:
            try:
                self._listed = (time.monotonic(), self._client.list_pods())
            except RunPodError as error:
                raise _explained(error) from error
        for pod in self._listed[1]:
            token = pod_token(pod)
            if token and read_entry(self._store, token):
                yield token, pod

    def _pods_of(self, token: str) -> list[Pod]:
        """Raises RunPodError."""
        return [pod for pod in self._client.list_pods() if pod_token(pod) == token]

    def alive(self, handle: Handle) -> bool:
        looked_at, alive = self._looked.get(handle.token, (None, True))
        if looked_at is None or time.monotonic() - looked_at >= _LOOK_EVERY_S:
            try:
                pod = self._client.get_pod(handle.id)
                alive = pod is not None and pod.status not in _DEAD
            except RunPodError:
                pass  # the lease tells more: RunPod may be away while the pod works
            self._looked[handle.token] = (time.monotonic(), alive)
        return alive

    def trouble(self, handle: Handle) -> str | None:
        try:
            lines = self._client.pod_logs(handle.id, source="system", tail=50, max_seconds=4.0)
        except RunPodError:
            return None  # nothing known
        return next((line for line in reversed(lines) if _HOPELESS.search(line)), None)

    def last_words(self, handle: Handle) -> str:
        try:
            lines = self._client.pod_logs(handle.id, source="container", tail=20, max_seconds=6.0)
        except NotFound:
            return "the pod is gone, and its log with it"
        except RunPodError as error:
            return f"its log cannot be read: {error}"
        return "The pod's last lines:\n" + "\n".join(lines) if lines else ""

    # ----------------------------------------------------------------------------------------------
    # Ending

    def terminate(self, handle: Handle, outcome: str = "") -> None:
        self._end_token(handle.token, outcome, handle.id)

    def _end_token(self, token: str, outcome: str, pod_id: str | None = None) -> None:
        """End every pod of the attempt, see them gone, and close its entry. Raises TimeoutError."""
        end_pods(self._client, self._store, token, outcome, [pod_id] if pod_id else [])


def _parameters(recipe: Recipe) -> int:
    return parameters(recipe.model, recipe.tokenizer.vocab_size)


def _explained(error: RunPodError) -> AttemptFailed:
    """The failure's word for what RunPod has refused."""
    failures: dict[type[RunPodError], Failure] = {
        Unauthorized: Failure.BAD_REQUEST,
        Invalid: Failure.BAD_REQUEST,
        InsufficientBalance: Failure.BUDGET,
        # Another candidate may do, or the same one later.
        NoCapacity: Failure.NO_CAPACITY,
        RuleViolation: Failure.NO_CAPACITY,
        Forbidden: Failure.NO_CAPACITY,
        RateLimited: Failure.NO_CAPACITY,
        Unavailable: Failure.NO_CAPACITY,
    }
    failure = next((word for kind, word in failures.items() if isinstance(error, kind)), None)
    if failure is None:
        return AttemptFailed(Failure.FAILED, f"{error}. Run it again; RunPod does not answer so as a rule")
    return AttemptFailed(failure, str(error))


def configured_launcher(
    store: ObjectStore,
    *,
    hardware: Hardware | None = None,
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> RunPodLauncher:
    """The launcher as the environment, the recipe's hardware and the run's settings have it.

    Raises ValueError (a variable or a setting that is missing or wrong) and AttemptFailed.
    """
    pinned = recorded_image(store, "training")
    return RunPodLauncher(
        store,
        RunPodClient.from_environment(environment),
        resolve_settings(hardware=hardware, environment=environment, run=settings),
        image=pinned.reference if pinned else None,
        patience=PATIENCE,
        max_pods=number_setting(MAX_PODS_ENV, default=DEFAULT_MAX_PODS),
        environment=environment,
    )
