"""The REST API's routes of endpoints."""

from __future__ import annotations

from emulators.runpod.routes import Answer, Call, Route, follow_logs, page


def list_endpoints(call: Call) -> Answer:
    documents = [endpoint.document() for endpoint in call.platform.serverless.endpoints.values()]
    return page(call, "endpoints", documents)


def create_endpoint(call: Call) -> Answer:
    return Answer(status=201, body=call.platform.serverless.create(call.body).document())


def get_endpoint(call: Call) -> Answer:
    return Answer(body=call.platform.serverless.endpoint(call.path["id"]).document())


def update_endpoint(call: Call) -> Answer:
    return Answer(body=call.platform.serverless.update(call.path["id"], call.body).document())


def delete_endpoint(call: Call) -> Answer:
    call.platform.serverless.delete(call.path["id"])
    return Answer(status=204)


def list_workers(call: Call) -> Answer:
    return Answer(body=call.platform.serverless.endpoint(call.path["id"]).workers_document())


def list_releases(call: Call) -> Answer:
    return Answer(body=call.platform.serverless.endpoint(call.path["id"]).releases_document())


def worker_logs(call: Call) -> Answer:
    worker = call.platform.serverless.endpoint(call.path["id"]).worker(call.path["workerId"])
    return follow_logs(call, worker.logs, worker.id)


ROUTES = (
    Route(method="GET", template="/v2/serverless", handle=list_endpoints),
    Route(method="POST", template="/v2/serverless", handle=create_endpoint),
    Route(method="GET", template="/v2/serverless/{id}", handle=get_endpoint),
    Route(method="PATCH", template="/v2/serverless/{id}", handle=update_endpoint),
    Route(method="DELETE", template="/v2/serverless/{id}", handle=delete_endpoint),
    Route(method="GET", template="/v2/serverless/{id}/workers", handle=list_workers),
    Route(method="GET", template="/v2/serverless/{id}/releases", handle=list_releases),
    Route(method="GET", template="/v2/serverless/{id}/workers/{workerId}/logs", handle=worker_logs),
)
