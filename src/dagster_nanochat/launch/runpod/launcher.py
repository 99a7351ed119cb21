"""The RunPod launcher: an attempt on a rented machine, asked for once and given back for certain.

The machine is a pod, or a cluster of several where the settings ask for nodes. It is named after its attempt,
and the ledger of the store has an entry for it before it is asked for: so whoever finds a machine knows whose
it is, and one that is in no ledger of this store is left alone. RunPod's word that a pod runs says nothing
(runpod.md, section 2), so what is relied on is that its supervisor renews the attempt's lease; RunPod is
asked now and then whether the machine is still there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from dagster_nanochat.launch.base import THREADS_ENV, Handle, Offer, Patience, Request, number_setting
from dagster_nanochat.launch.images import TRAINING_IMAGE_ENV, record_image, recorded_image
from dagster_nanochat.launch.registry import ImageError, PinnedImage, resolve_image
from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.config import RunPodSettings, resolve_settings, variable
from dagster_nanochat.launch.runpod.containers import (
    GROUP_ENV,
    LIFETIME_MARGIN_S,
    machine_request,
    missing_secrets,
    pod_secrets,
    require_secrets,
)
from dagster_nanochat.launch.runpod.ending import end_machines
from dagster_nanochat.launch.runpod.errors import (
    Forbidden,
    InsufficientBalance,
    Invalid,
    MaybeCreated,
    NoCapacity,
    NotFound,
    QuotaExceeded,
    RateLimited,
    RuleViolation,
    RunPodError,
    Unauthorized,
    Unavailable,
)
from dagster_nanochat.launch.runpod.machines import (
    Kind,
    Machine,
    console_url,
    find_machine,
    list_machines,
    new_group,
)
from dagster_nanochat.launch.runpod.models import ClusterRequest, LogSource, PodRequest
from dagster_nanochat.launch.runpod.offers import RunPodOffer, find_offers
from nanochat.attempts import live_attempt, request_cancel
from nanochat.events import EventStream, ending_of
from nanochat.failures import AttemptFailed, Failure
from nanochat.recipes import Hardware
from nanochat.store import ObjectStore, StoreError
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

# What the host's log says of a container that will never start here (runpod.md, sections 2 and 6).
_HOPELESS = re.compile(
    r"failed to pull image|image pull: .*(not found|denied|unauthorized)|error starting container"
    r"|cannot be mapped to a host ID|layer does not exist",
    re.IGNORECASE,
)
_LOOK_EVERY_S = 20.0
_LIST_EVERY_S = 5.0
_CREATIONS = 3
# A machine whose creation was answered with an error appears in the list a little later.
_LOOK_FOR_LOST_S = (1.0, 2.0, 4.0, 8.0)
# Of the half minute in which a terminated run gives its machine back.
_SAVED_WITHIN_S = 20.0
_SAVED_EVERY_S = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPodHandle(Handle):
    kind: Kind


class RunPodLauncher:
    """Runs attempts on pods and clusters. Raises AttemptFailed where RunPod or the settings do not let it."""

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
        self._listed: tuple[float, list[Machine]] = (-math.inf, [])
        self._looked: dict[str, tuple[float, bool]] = {}
        # The most nodes that a machine was seen with: they come one by one, and none goes.
        self._nodes: dict[str, int] = {}

    # ----------------------------------------------------------------------------------------------
    # Before money

    def offers(self, request: Request, flops: float | None = None) -> list[Offer]:
        require_reachable(self._store)
        if self._settings.nodes > 1 and self._settings.min_ram_gib:
            raise AttemptFailed(
                Failure.BAD_REQUEST,
                f"{variable('min_ram_gib')}={self._settings.min_ram_gib:g}: RunPod cannot be asked for main "
                f"memory where it is asked for a cluster; unset it, or {variable('nodes')}",
            )
        try:
            return list(find_offers(self._client, request, self._settings, flops))
        except RunPodError as error:
            raise explained(error) from error

    def hardware(self, wanted: Hardware, offer: Offer) -> JobHardware:
        assert isinstance(offer, RunPodOffer)
        return JobHardware(
            nodes=offer.nodes,
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

    def image(self) -> str:
        """By its digest; the one that the environment names is recorded as this store's from now on."""
        if self._image is None:
            self._image = record_image(self._store, "training", self._resolve_image()).reference
        return self._image

    def next_image(self) -> str:
        """What `image` would be, for who only looks: nothing is recorded."""
        return self._image or self._resolve_image().reference

    def _resolve_image(self) -> PinnedImage:
        named = self._environment.get(TRAINING_IMAGE_ENV)
        if not named:
            raise AttemptFailed(
                Failure.BAD_REQUEST,
                f"no training image is known: set {TRAINING_IMAGE_ENV} to one that `make images` has pushed",
            )
        try:
            return resolve_image(named)
        except ImageError as error:
            raise AttemptFailed(Failure.BAD_REQUEST, str(error)) from error

    # ----------------------------------------------------------------------------------------------
    # Launching

    def launch(self, job: TrainingJob, offer: Offer) -> Handle:
        assert isinstance(offer, RunPodOffer)
        self._require_room()
        try:
            require_secrets(self._client, pod_secrets(self._environment))
        except RunPodError as error:
            raise explained(error) from error
        if self._settings.deadline_h:
            deadline_s = min(job.deadline_s, 3600 * self._settings.deadline_h)
            job = job.model_copy(update={"deadline_s": deadline_s})
        request = machine_request(
            job,
            offer,
            self._settings,
            store_url=self._store.url,
            api_url=self._client.base_url,
            environment=self._environment,
        )
        self._store.put(f"{job.attempt_prefix}/job.json", job.to_bytes())
        entry = LedgerEntry(
            token=job.token,
            provider=self.name,
            model=job.model,
            stage=job.stage,
            prefix=job.prefix,
            offer=offer.name,
            usd_per_h=offer.price_usd_per_h,
            nodes=offer.nodes,
            user=user_name(),
            host=machine_name(),
            asked_at=utc_now(),
            deadline_at=utc_now() + timedelta(seconds=job.deadline_s + LIFETIME_MARGIN_S),
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
            machine = self._create(request, job.token)
            self._note_machine(job.token, machine)
        except BaseException as error:
            # Whatever went wrong, an interrupt too: if there is a machine, nobody else will end it.
            outcome = error.failure if isinstance(error, AttemptFailed) else Failure.CANCELLED
            try:
                self._end_token(job.token, str(outcome))
            except TimeoutError as stays:
                raise AttemptFailed(Failure.LOST, f"{error}. {stays}") from error
            raise
        return self._handle(job.token, machine)

    def _handle(self, token: str, machine: Machine) -> RunPodHandle:
        url = console_url(machine.kind, machine.id)
        return RunPodHandle(launcher=self.name, token=token, id=machine.id, url=url, kind=machine.kind)

    def _note_machine(self, token: str, machine: Machine) -> None:
        change_entry(
            self._store,
            token,
            lambda entry: {
                "machine": machine.id,
                "url": console_url(machine.kind, machine.id),
                "usd_per_h": machine.usd_per_h or entry.usd_per_h,
                # The sweeper may have closed it meanwhile.
                **({} if entry.open else {"ended_at": None, "outcome": "", "billed_usd": None}),
            },
        )

    def _require_room(self) -> None:
        """Machines whose orchestrator has died hold no slot any more, and count."""
        living = [token for token, machine in self._ours() if not machine.dead]
        if len(living) >= self._max_pods:
            raise AttemptFailed(
                Failure.NO_CAPACITY,
                f"{len(living)} pods of this store are running, as many as {MAX_PODS_ENV} allows",
            )

    def missing_secrets(self) -> list[str]:
        """Names of secrets that a pod needs and RunPod does not have. Raises RunPodError."""
        return missing_secrets(self._client, pod_secrets(self._environment))

    def _create(self, request: PodRequest | ClusterRequest, token: str) -> Machine:
        """One machine of that token. Raises AttemptFailed."""
        doubt: RunPodError | None = None
        for _ in range(_CREATIONS):
            try:
                return self._ask_for(request)
            except MaybeCreated as error:
                doubt = error
                change_entry(self._store, token, lambda entry: {"in_doubt": True})
                found = self._look_for(token)
                if found is not None:
                    return found
            except RunPodError as error:
                raise explained(error) from error
        assert doubt is not None
        raise AttemptFailed(Failure.NO_CAPACITY, str(doubt)) from doubt

    def _ask_for(self, request: PodRequest | ClusterRequest) -> Machine:
        """Every cluster is of a group of its own, so that the members of twins are told apart. Raises
        RunPodError."""
        if isinstance(request, PodRequest):
            return Machine.of_pod(self._client.create_pod(request))
        group = new_group()
        named = {"name": f"{request.name}-{group}", "env": {**request.env, GROUP_ENV: group}}
        return Machine.of_cluster(self._client.create_cluster(request.model_copy(update=named)))

    def _look_for(self, token: str) -> Machine | None:
        for pause_s in _LOOK_FOR_LOST_S:
            time.sleep(pause_s)
            try:
                for machine in list_machines(self._client):
                    if machine.token == token:
                        return machine
            except RunPodError:
                continue  # it is looked for again before the attempt is given up
        return None

    # ----------------------------------------------------------------------------------------------
    # Finding

    def find(self, prefix: str) -> Handle | None:
        found = None
        for token, machine in self._ours():
            entry = read_entry(self._store, token)
            if entry is None or entry.prefix != prefix:
                continue
            handle = self._handle(token, machine)
            if machine.dead or not entry.open or self._is_over(prefix, token):
                try:
                    self.terminate(handle, entry.outcome)
                except TimeoutError as stays:
                    raise AttemptFailed(Failure.LOST, str(stays)) from stays
            elif entry.machine in (None, machine.id):
                self._note_machine(token, machine)
                found = handle
        return found

    def _is_over(self, prefix: str, token: str) -> bool:
        told = EventStream(self._store, f"{attempt_prefix(prefix, token)}/events.jsonl").all()
        return ending_of(told) is not None

    def _ours(self) -> Iterator[tuple[str, Machine]]:
        """Every machine that is in this store's ledger, with its token. Raises AttemptFailed."""
        if time.monotonic() - self._listed[0] >= _LIST_EVERY_S:
            try:
                self._listed = (time.monotonic(), list_machines(self._client))
            except RunPodError as error:
                raise explained(error) from error
        for machine in self._listed[1]:
            if machine.token and read_entry(self._store, machine.token):
                yield machine.token, machine

    def alive(self, handle: Handle) -> bool:
        """With one node gone, a cluster is of no more use."""
        assert isinstance(handle, RunPodHandle)
        looked_at, alive = self._looked.get(handle.token, (None, True))
        if looked_at is None or time.monotonic() - looked_at >= _LOOK_EVERY_S:
            try:
                machine = find_machine(self._client, handle.kind, handle.id)
                alive = machine is not None and not machine.dead and self._is_whole(handle.token, machine)
            except RunPodError:
                pass  # the lease tells more: RunPod may be away while the machine works
            self._looked[handle.token] = (time.monotonic(), alive)
        return alive

    def _is_whole(self, token: str, machine: Machine) -> bool:
        nodes = len(machine.pods)
        self._nodes[token] = max(nodes, self._nodes.get(token, 0))
        return nodes == self._nodes[token]

    def trouble(self, handle: Handle) -> str | None:
        try:
            logs = self._logs(handle, "system", tail=50, max_seconds=4.0)
        except RunPodError:
            return None  # nothing known
        lines = (line for log in logs.values() for line in reversed(log) if _HOPELESS.search(line))
        return next(lines, None)

    def last_words(self, handle: Handle) -> str:
        try:
            logs = self._logs(handle, "container", tail=20, max_seconds=6.0)
        except NotFound:
            return "the pod is gone, and its log with it"
        except RunPodError as error:
            return f"its log cannot be read: {error}"
        words = [f"The {name}'s last lines:\n" + "\n".join(log) for name, log in logs.items() if log]
        return "\n".join(words)

    def _logs(
        self, handle: Handle, source: LogSource, *, tail: int, max_seconds: float
    ) -> dict[str, list[str]]:
        """Of every node by its name, the first one's first. Raises RunPodError."""
        assert isinstance(handle, RunPodHandle)
        if handle.kind == "pod":
            names = {"pod": handle.id}
        else:
            members = self._client.cluster_pods(handle.id)
            ranks = {member.id: (member.cluster and member.cluster.rank) or 0 for member in members}
            names = {f"node {ranks[id]}": id for id in sorted(ranks, key=lambda id: ranks[id])}

        def log(pod_id: str) -> list[str]:
            return self._client.pod_logs(pod_id, source=source, tail=tail, max_seconds=max_seconds)

        with ThreadPoolExecutor(max_workers=max(1, len(names))) as pool:
            return dict(zip(names, pool.map(log, names.values()), strict=True))

    # ----------------------------------------------------------------------------------------------
    # Ending

    def terminate(self, handle: Handle, outcome: str = "") -> None:
        assert isinstance(handle, RunPodHandle)
        if outcome == Failure.CANCELLED:
            # A store that is away is no reason to let the machine live on.
            with contextlib.suppress(StoreError):
                self._let_it_save(handle.token)
        self._end_token(handle.token, outcome, {handle.id: handle.kind})

    def _let_it_save(self, token: str) -> None:
        """Where a supervisor is at work: ask for a last checkpoint, and wait a little for it."""
        entry = read_entry(self._store, token)
        lease = live_attempt(self._store, entry.prefix) if entry else None
        if entry is None or lease is None or (lease.token, lease.owner) != (token, "supervisor"):
            return
        request_cancel(self._store, entry.prefix, token, f"{user_name()} on {machine_name()}")
        deadline = time.monotonic() + _SAVED_WITHIN_S
        while time.monotonic() < deadline and not self._is_over(entry.prefix, token):
            time.sleep(_SAVED_EVERY_S)

    def _end_token(self, token: str, outcome: str, known: Mapping[str, Kind] | None = None) -> None:
        """End every machine of the attempt, see them gone, and close its entry. Raises TimeoutError."""
        end_machines(self._client, self._store, token, outcome, known)


def require_reachable(store: ObjectStore) -> None:
    """Raises AttemptFailed for a store that is on this machine alone."""
    if not store.url.startswith("s3://"):
        raise AttemptFailed(
            Failure.BAD_REQUEST,
            f"a pod cannot reach the store {store.url}: set NANOCHAT_STORE=s3://bucket/prefix",
        )


def explained(error: RunPodError, rule_violation: Failure = Failure.NO_CAPACITY) -> AttemptFailed:
    """The failure's word for what RunPod has refused. rule_violation: for a 400 that may be another offer's
    fault, or our own."""
    failures: dict[type[RunPodError], Failure] = {
        Unauthorized: Failure.BAD_REQUEST,
        Invalid: Failure.BAD_REQUEST,
        QuotaExceeded: Failure.BAD_REQUEST,
        InsufficientBalance: Failure.BUDGET,
        # Another candidate may do, or the same one later.
        NoCapacity: Failure.NO_CAPACITY,
        RuleViolation: rule_violation,
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
