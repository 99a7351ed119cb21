"""What is rented in one piece: a pod, or a cluster of pods. Found, looked at and deleted alike."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import uuid
from datetime import datetime
from typing import Literal

from dagster_nanochat.launch.runpod.client import RunPodClient
from dagster_nanochat.launch.runpod.errors import Conflict, NotFound
from dagster_nanochat.launch.runpod.models import Cluster, Pod, PodStatus
from nanochat.store.ledger import LedgerEntry

Kind = Literal["pod", "cluster"]

DEAD = (PodStatus.EXITED, PodStatus.ERROR, PodStatus.TERMINATED)
_CONSOLE_URLS: dict[Kind, str] = {
    "pod": "https://console.runpod.io/pods?id={}",
    "cluster": "https://console.runpod.io/cluster?id={}",
}
# A cluster's members know it by its group, since RunPod does not tell a container the cluster's id.
_NAME = re.compile(r"nanochat-.*?(?P<token>\d{8}T\d{6}-[0-9a-f]{8})(?:-(?P<group>g[0-9a-f]{8}))?(?P<rest>.*)")


def machine_title(model: str, stage: str, token: str) -> str:
    """What a pod or cluster of the attempt is called at RunPod."""
    return f"nanochat-{model}-{stage}-{token}"


def new_group() -> str:
    return f"g{uuid.uuid4().hex[:8]}"


def kind_of(entry: LedgerEntry) -> Kind:
    return "cluster" if entry.nodes > 1 else "pod"


def console_url(kind: Kind, id: str) -> str:
    return _CONSOLE_URLS[kind].format(id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """pods: the pod itself, or the members of the cluster that are there. usd_per_h: of all of it; None
    where RunPod does not say. nodes: how many pods it is to have; None where that is not known."""

    kind: Kind
    id: str
    name: str
    pods: tuple[Pod, ...]
    nodes: int | None
    created_at: datetime | None

    @classmethod
    def of_pod(cls, pod: Pod) -> Machine:
        return cls(kind="pod", id=pod.id, name=pod.name, pods=(pod,), nodes=1, created_at=pod.created_at)

    @classmethod
    def of_cluster(cls, cluster: Cluster, members: tuple[Pod, ...] = ()) -> Machine:
        return cls(
            kind="cluster",
            id=cluster.id,
            name=cluster.name,
            pods=members,
            nodes=cluster.compute.pod_count if cluster.compute else None,
            created_at=cluster.created_at,
        )

    @property
    def token(self) -> str | None:
        """The attempt that it is named after, if it is one of ours."""
        found = _NAME.fullmatch(self.name)
        # RunPod adds to the names of members.
        return found["token"] if found and (self.kind == "cluster" or not found["rest"]) else None

    @property
    def group(self) -> str | None:
        found = _NAME.fullmatch(self.name)
        return found["group"] if found else None

    @property
    def dead(self) -> bool:
        """Whether it, or one of its nodes, has stopped; it costs on."""
        return any(pod.status in DEAD for pod in self.pods)

    @property
    def status(self) -> str:
        return ", ".join(sorted({str(pod.status) for pod in self.pods})) or "no pod yet"

    @property
    def usd_per_h(self) -> float | None:
        prices = [pod.usd_per_h for pod in self.pods]
        known = [price for price in prices if price]
        return sum(known) if known and len(known) == self.nodes else None


def list_machines(client: RunPodClient) -> list[Machine]:
    """Every pod and cluster of the account. Raises RunPodError."""
    pods = client.list_pods(include_cluster_pods=True)
    clusters = {cluster.id: cluster for cluster in client.list_clusters()}
    members: dict[str, list[Pod]] = {id: [] for id in clusters}
    for pod in pods:
        if pod.cluster is not None:
            members.setdefault(pod.cluster.id, []).append(pod)
    return [
        *(Machine.of_pod(pod) for pod in pods if pod.cluster is None),
        *(
            # Pods may be seen a while longer than their cluster, and cost as long.
            Machine.of_cluster(
                clusters.get(id) or Cluster(id=id, name=left[0].name, created_at=left[0].created_at),
                tuple(left),
            )
            for id, left in members.items()
        ),
    ]


def find_machine(client: RunPodClient, kind: Kind, id: str) -> Machine | None:
    """None once it is gone. Raises RunPodError."""
    if kind == "pod":
        pod = client.get_pod(id)
        return Machine.of_pod(pod) if pod else None
    cluster = client.get_cluster(id)
    if cluster is None:
        return None
    try:
        return Machine.of_cluster(cluster, tuple(client.cluster_pods(id)))
    except NotFound:
        return None


def delete_machine(client: RunPodClient, kind: Kind, id: str, seen: Machine | None = None) -> None:
    """Ask for its end. seen: as it was listed last. Raises RunPodError."""
    if kind == "pod":
        client.delete_pod(id)
    elif client.get_cluster(id) is not None:
        client.delete_cluster(id)
    else:
        for pod in seen.pods if seen else ():
            # As long as RunPod takes it for a member, it is the cluster's deletion that ends it.
            with contextlib.suppress(Conflict):
                client.delete_pod(pod.id)
