"""The RunPod emulator: what every request meets, and what is known of GPUs and images."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import pytest
from emulators.runpod import Image, serve
from emulators.runpod.client import GPU, Api
from emulators.runpod.validation import Contract
from standins.waiting import wait_for

_POD = {"name": "a", "image": "img", "gpu": {"id": GPU}}
NO_INSTANCES = "There are no longer any instances available"


def test_a_body_that_is_not_as_described_is_refused_with_every_reason(runpod):
    api = runpod()
    answer = api(
        "POST", "/pods", json={"image": "img", "dataCenterId": "X", "gpu": {"id": GPU, "count": 0, "size": 1}}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["errors"] == [
        "$: missing property 'name'",
        "$.gpu.count: 0 is less than the minimum of 1",
        "$.gpu: additional properties 'size' not allowed",
        "$: additional properties 'dataCenterId' not allowed",
    ]
    assert api("POST", "/pods", content=b"{").status_code == 422
    assert api("GET", "/pods", params={"limit": "0"}).status_code == 422
    assert api("GET", "/pods", params={"anything": "else"}).status_code == 200
    assert api.emulator.pods() == []


@pytest.mark.parametrize(
    "change",
    [
        {"cpu": {"id": "cpu5c", "vcpuCount": 4}},
        {"gpu": {"id": "no such GPU"}},
        {"gpu": {"id": GPU, "count": 9}},
        {"gpu": {"id": GPU, "minCudaVersion": "12.8", "allowedCudaVersions": ["12.8"]}},
        {"env": {f"V{number}": "" for number in range(51)}},
        {"args": "{no JSON"},
    ],
)
def test_what_the_rules_forbid_is_refused_like_missing_capacity(runpod, change: dict[str, Any]):
    assert runpod()("POST", "/pods", json={**_POD, **change}).status_code == 400


def test_capacity_is_by_type_data_center_and_cloud(runpod):
    api = runpod()
    api.emulator.catalog.stock[GPU, "US-KS-2", "SECURE"] = 2
    here = {"dataCenterIds": ["US-KS-2"]}
    pod = api.create(gpu={"id": GPU, "count": 2}, **here)
    full = api("POST", "/pods", json={**_POD, **here})
    assert full.status_code == 400
    assert full.json()["detail"].startswith(NO_INSTANCES)
    assert api.create(cloud="COMMUNITY", **here)["cost"] == 0.79
    assert api.create()["dataCenterId"] != "US-KS-2"
    api("DELETE", f"/pods/{pod['id']}")
    wait_for(lambda: api("POST", "/pods", json={**_POD, **here}).status_code == 201, within_s=10)
    newer = {"gpu": {"id": GPU, "minCudaVersion": "99.0"}}
    assert api("POST", "/pods", json={**_POD, **newer}).json()["detail"].startswith(NO_INSTANCES)


def test_the_catalog_tells_prices_and_stock(runpod):
    api = runpod()
    api.emulator.catalog.set_price(GPU, secure=1.23)
    api.emulator.catalog.stock[GPU, "US-KS-2", "SECURE"] = 0
    plain = api("GET", f"/catalog/gpus/{GPU}").json()
    assert plain["price"] == {"secure": 1.23, "community": 0.0, "serverless": 1.91}
    assert plain["community"] is False
    assert "availability" not in plain
    assert api("GET", "/catalog/gpus", params={"include": "AVAILABILITY"}).status_code == 400
    query = {"include": "AVAILABILITY", "product": "POD"}
    gpus = api("GET", "/catalog/gpus", params=query).json()["gpus"]
    shown = next(gpu for gpu in gpus if gpu["id"] == GPU)
    levels = {place["id"]: place["availability"] for place in shown["dataCenters"]}
    assert (shown["availability"], levels["US-KS-2"]) == ("HIGH", "NONE")
    assert api("GET", "/catalog/gpus/none").status_code == 404


def test_lists_come_in_pages(runpod):
    api = runpod()
    made = [api.create()["id"] for _ in range(3)]
    seen, cursor = [], None
    for _ in range(2):
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = api("GET", "/pods", params=params).json()
        seen += [pod["id"] for pod in page["pods"]]
        cursor = page["pagination"]["nextCursor"]
    assert (seen, cursor, page["pagination"]["hasNextPage"]) == (made, None, False)


def test_quotas_are_told_and_kept(runpod):
    api = runpod(quota_per_minute=3)
    answers = [api("GET", "/pods") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[0].headers["RateLimit"].startswith('"minute";r=2;t=60')
    assert answers[0].headers["RateLimit-Policy"].startswith('"minute";q=3;w=60')
    assert 0 < int(answers[3].headers["Retry-After"]) <= 60
    assert answers[3].json()["detail"] == "rate limit exceeded for the minute window"
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4


def test_the_gate_refuses_unnamed_clients_retired_apis_and_what_is_too_large(runpod):
    api = runpod()
    url = api.emulator.url
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url + "/pods")
    assert (refused.value.code, refused.value.read()) == (403, b"error code: 1010")
    root = url.removesuffix("/v2")
    for retired in ("/v1/pods", "/graphql"):
        assert httpx.post(root + retired, trust_env=False).status_code == 410
    assert httpx.get(url + "/pods", trust_env=False).json()["detail"] == "missing bearer token"
    assert api("POST", "/pods", json={**_POD, "env": {"A": "x" * 110_000}}).status_code == 413
    wrong = api("PUT", "/pods")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "GET, POST")
    assert api("GET", "/nothing").json()["detail"] == "resource not found"
    assert api("GET", "/pods/none").json()["detail"] == "pod not found"


def test_an_answer_against_the_contract_is_a_loud_mistake(runpod, monkeypatch: pytest.MonkeyPatch):
    api = runpod()
    pod = api.create()
    document = type(api.emulator._platform.pods[pod["id"]]).document
    monkeypatch.setattr(
        "emulators.runpod.pods.Pod.document",
        lambda self: {**document(self), "status": "ASLEEP", "cost": None},
    )
    answer = api("GET", f"/pods/{pod['id']}")
    assert answer.status_code == 500
    assert "'ASLEEP' is not one of" in answer.text
    assert "$.cost" in answer.text
    assert len(api.emulator.violations) == 1
    api.emulator.violations.clear()


def test_secrets_and_registry_credentials_never_come_back(runpod):
    api = runpod()
    secret = api("POST", "/account/secrets", json={"name": "a", "value": "hidden"}).json()
    path = f"/account/secrets/{secret['id']}"
    assert api("POST", "/account/secrets", json={"name": "a", "value": "x"}).status_code == 409
    assert api("POST", "/account/secrets", json={"name": "RunPod_x", "value": "x"}).status_code == 422
    assert api("PATCH", path, json={"description": "d"}).json()["description"] == "d"
    assert "hidden" not in api("GET", path).text
    assert [api("DELETE", path).status_code, api("GET", path).status_code] == [204, 404]
    body = {"name": "ghcr", "username": "me", "password": "hidden"}
    registry = api("POST", "/registries", json=body).json()
    assert registry == {"id": registry["id"], "name": "ghcr"}
    assert api.create(registry=registry["id"])["registry"] == registry["id"]
    assert api("POST", "/pods", json={**_POD, "registry": "none"}).status_code == 404
    assert api("DELETE", f"/registries/{registry['id']}").status_code == 204


def test_a_tag_resolves_to_the_digest_of_what_was_published_last(runpod):
    emulator = runpod().emulator
    first = emulator.registry.publish("team/nanochat", "latest", "one")
    url = f"{emulator.registry_url}/v2/team/nanochat/manifests"
    head = httpx.head(f"{url}/latest", trust_env=False)
    assert (head.status_code, head.headers["Docker-Content-Digest"]) == (200, first)
    second = emulator.registry.publish("team/nanochat", "latest", "two")
    assert httpx.head(f"{url}/latest", trust_env=False).headers["Docker-Content-Digest"] == second != first
    assert httpx.get(f"{url}/{first}", trust_env=False).headers["Docker-Content-Digest"] == first
    config = httpx.get(f"{url}/{first}", trust_env=False).json()["config"]
    blob = httpx.get(f"{url.replace('manifests', 'blobs')}/{config['digest']}", trust_env=False)
    assert (len(blob.content), blob.json()["architecture"]) == (config["size"], "amd64")
    assert httpx.head(f"{url}/none", trust_env=False).status_code == 404


def test_without_the_openapi_file_everything_works_but_nothing_is_validated(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_RUNPOD_SPEC", str(tmp_path / "none.json"))
    with serve(state_dir=tmp_path, images={"*": Image(entrypoint=("sleep", "600"))}) as emulator:
        assert Api(emulator).create(unknown=1)["status"] == "RUNNING"


def test_the_contract_is_read_from_the_file_with_a_short_list_of_additions(tmp_path: Path):
    spec = {"paths": {}, "components": {"schemas": {}}}
    for listed in ("Pods", "Clusters", "Registries", "Endpoints"):
        spec["components"]["schemas"][f"List{listed}Response"] = {"type": "object", "properties": {}}
    spec["components"]["schemas"]["CreateGpuConfig"] = {"allOf": []}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    contract = Contract(tmp_path / "spec.json")
    assert contract.request_errors("POST", "/v2/account/secrets", {"name": "a", "value": "b"}) == []
    with pytest.raises(LookupError, match="has no GET /v2/pods"):
        contract.request_errors("GET", "/v2/pods", None)
