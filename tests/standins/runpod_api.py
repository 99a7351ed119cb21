"""RunPod's own specification as a judge of requests, and what else tests of its client share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

CANARY = "rpa_CANARY0123456789"
# What RunPod's newer material has and the specification at hand has not.
NEWER_PATHS = {"/v2/account/secrets"}
NEWER_PARAMETERS = {"cursor"}


class Specification:
    """The OpenAPI 3.1 document (whose schemas are JSON Schema 2020-12)."""

    def __init__(self, path: Path) -> None:
        self.document = json.loads(path.read_text(encoding="utf-8"))
        resource = Resource.from_contents(self.document, default_specification=DRAFT202012)
        self._registry: Registry[Any] = Registry().with_resource("urn:runpod", resource)

    def resolve(self, node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            found = self._registry.resolver("urn:runpod").lookup(node["$ref"]).contents
            node = {**found, **{key: value for key, value in node.items() if key != "$ref"}}
        return node

    def errors(self, schema: dict[str, Any], value: Any) -> list[str]:
        text = json.dumps(schema).replace('"#/', '"urn:runpod#/')
        validator = jsonschema.Draft202012Validator(json.loads(text), registry=self._registry)
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]

    def schema_errors(self, name: str, value: Any) -> list[str]:
        return self.errors({"$ref": f"#/components/schemas/{name}"}, value)

    def operation(self, method: str, path: str) -> tuple[str, dict[str, Any]]:
        """The template and the operation of a request's path."""
        for template, operations in self.document["paths"].items():
            pattern = re.sub(r"\{\w+\}", "[^/]+", template)
            if re.fullmatch(pattern, path) and method.lower() in operations:
                return template, operations[method.lower()]
        raise AssertionError(f"{method} {path} is not in the specification")

    def check(self, request: httpx.Request) -> str:
        """Raise AssertionError where a request is not as specified; returns ``METHOD template``."""
        if request.url.path in NEWER_PATHS:
            return f"{request.method} {request.url.path}"
        template, operation = self.operation(request.method, request.url.path)
        assert request.headers["authorization"] == f"Bearer {CANARY}"
        assert request.headers["user-agent"].startswith("dagster-nanochat/")
        known = {
            parameter["name"]: parameter
            for parameter in map(self.resolve, operation.get("parameters", ()))
            if parameter["in"] == "query"
        }
        for name, text in request.url.params.items():
            if name in NEWER_PARAMETERS:
                continue
            assert name in known, f"{template} knows no parameter {name!r}"
            schema = self.resolve(known[name]["schema"])
            value: Any = {"integer": int, "boolean": json.loads, "array": lambda t: t.split(",")}.get(
                schema["type"], str
            )(text)
            assert not self.errors(schema, value)
        body = operation.get("requestBody")
        if body is None:
            assert not request.content
        else:
            schema = body["content"]["application/json"]["schema"]
            assert not self.errors(schema, json.loads(request.content))
        return f"{request.method} {template}"

    def examples(self, template: str, method: str) -> dict[int, list[Any]]:
        """The JSON examples of an operation's answers, by status."""
        found: dict[int, list[Any]] = {}
        for status, node in self.document["paths"][template][method]["responses"].items():
            answer = self.resolve(node)
            for kind, content in answer.get("content", {}).items():
                if status != "default" and "json" in kind:
                    examples = [example["value"] for example in content.get("examples", {}).values()]
                    found.setdefault(int(status), []).extend(examples)
        return found


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def problem(status: int, detail: str, **fields: Any) -> httpx.Response:
    """An error as RunPod answers it."""
    headers = {"content-type": "application/problem+json", "x-request-id": "req-7"} | fields.pop(
        "headers", {}
    )
    titles = {400: "Bad Request", 401: "Unauthorized", 422: "Unprocessable Entity"}
    document = {"title": titles.get(status, "Problem"), "status": status, "detail": detail, **fields}
    return httpx.Response(status, content=json.dumps(document), headers=headers)
