"""Requests and answers against RunPod's OpenAPI file.

The file is of August 2026. What came later and is known from elsewhere is added here and listed:
account secrets, the pagination of lists, and two fields of a GPU request.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError
from referencing import Registry
from referencing.jsonschema import DRAFT202012

_SPEC = "urn:runpod"
_PAGED = ("ListPodsResponse", "ListClustersResponse", "ListRegistriesResponse", "ListEndpointsResponse")
_PAGINATION = {
    "type": "object",
    "required": ["nextCursor", "hasNextPage"],
    "properties": {"nextCursor": {"type": ["string", "null"]}, "hasNextPage": {"type": "boolean"}},
}
_MINIMUM = {"type": "integer", "minimum": 1}
_GPU_REQUEST = {"properties": {"minRamPerGpu": _MINIMUM, "minVcpuCountPerGpu": _MINIMUM}}
_SECRET_NAME = r"^(?![Rr][Uu][Nn][Pp][Oo][Dd])[a-zA-Z_][a-zA-Z0-9_.\-/]*$"
_SECRET = {
    "type": "object",
    "required": ["id", "name", "description", "createdAt"],
    "properties": {
        "id": {"type": "string"},
        "name": {"type": "string"},
        "description": {"type": ["string", "null"]},
        "createdAt": {"type": "string", "format": "date-time"},
    },
}
_CREATE_SECRET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "value"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 191, "pattern": _SECRET_NAME},
        "value": {"type": "string", "minLength": 1},
        "description": {"type": "string"},
    },
}
_UPDATE_SECRET = {
    "type": "object",
    "additionalProperties": False,
    "minProperties": 1,
    "properties": {"value": {"type": "string", "minLength": 1}, "description": {"type": "string"}},
}

_FORMATS = FormatChecker(formats=())


@_FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.datetime.fromisoformat(value).tzinfo is not None


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _with_additions(spec: dict[str, Any]) -> dict[str, Any]:
    """The same document."""
    schemas = spec["components"]["schemas"]
    for name in _PAGED:
        schemas[name]["properties"]["pagination"] = _PAGINATION
    schemas["CreateGpuConfig"]["allOf"].append(_GPU_REQUEST)
    schemas["Secret"] = _SECRET
    schemas["CreateSecretRequest"] = _CREATE_SECRET
    schemas["UpdateSecretRequest"] = _UPDATE_SECRET
    problem = {"content": {"application/problem+json": {"schema": _ref("ErrorResponse")}}}
    listed = {
        "type": "object",
        "required": ["secrets"],
        "properties": {"secrets": {"type": "array", "items": _ref("Secret")}, "pagination": _PAGINATION},
    }
    spec["paths"]["/v2/account/secrets"] = {
        "get": {"responses": {"200": _json(listed), "default": problem}},
        "post": {
            "requestBody": _json(_ref("CreateSecretRequest")),
            "responses": {"201": _json(_ref("Secret")), "default": problem},
        },
    }
    spec["paths"]["/v2/account/secrets/{id}"] = {
        "get": {"responses": {"200": _json(_ref("Secret")), "default": problem}},
        "patch": {
            "requestBody": _json(_ref("UpdateSecretRequest")),
            "responses": {"200": _json(_ref("Secret")), "default": problem},
        },
        "delete": {"responses": {"204": {}, "default": problem}},
    }
    return spec


class Contract:
    """RunPod's OpenAPI file, with what came after it."""

    def __init__(self, path: Path) -> None:
        self._spec = _with_additions(json.loads(path.read_text(encoding="utf-8")))
        resource = DRAFT202012.create_resource(self._spec)
        self._registry = Registry().with_resource(_SPEC, resource)

    def request_errors(self, method: str, route: str, body: Any) -> list[str]:
        """What is wrong with a request's body, in the platform's words; empty when nothing is."""
        described = self._operation(method, route).get("requestBody")
        if described is None:
            return []
        return self._errors(described["content"]["application/json"]["schema"], body)

    def query_errors(self, method: str, route: str, query: dict[str, str]) -> list[str]:
        """The same for query parameters. Unknown ones are ignored."""
        errors = []
        for described in self._operation(method, route).get("parameters", []):
            parameter = self._resolve(described)
            if parameter["in"] != "query" or parameter["name"] not in query:
                continue
            schema = self._resolve(parameter["schema"])
            value = _parsed(query[parameter["name"]], schema)
            errors += [f"{parameter['name']}: {error}" for error in self._errors(schema, value)]
        return errors

    def response_errors(
        self, method: str, route: str, status: int, content_type: str | None, body: Any
    ) -> list[str]:
        """What is wrong with an answer of ours."""
        responses = self._operation(method, route).get("responses", {})
        described = responses.get(str(status), responses.get("default"))
        if described is None:
            return [f"{method} {route} never answers {status}"]
        content = self._resolve(described).get("content", {})
        if not content:
            return [] if body is None else [f"{method} {route} {status} has no body"]
        if content_type not in content:
            return [f"{method} {route} {status} is {', '.join(content)}, not {content_type}"]
        return self._errors(content[content_type]["schema"], body)

    def _operation(self, method: str, route: str) -> dict[str, Any]:
        operation = self._spec["paths"].get(route, {}).get(method.lower())
        if operation is None:
            raise LookupError(f"the specification has no {method} {route}")
        return dict(operation)

    def _resolve(self, described: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in described:
            described = self._registry.resolver(_SPEC).lookup(described["$ref"]).contents
        return described

    def _errors(self, schema: dict[str, Any], body: Any) -> list[str]:
        validator = Draft202012Validator(_absolute(schema), registry=self._registry, format_checker=_FORMATS)
        said = (self._words(error) for error in _leaves(validator.iter_errors(body)))
        return list(dict.fromkeys(words for words in said if words))

    def _words(self, error: ValidationError) -> str:
        path = error.json_path
        if error.validator == "required":
            missing = [name for name in error.validator_value if name not in error.instance]
            return f"{path}: missing property {', '.join(repr(name) for name in missing)}"
        if error.validator in ("additionalProperties", "unevaluatedProperties"):
            # Where a part of an allOf fails, all its properties count as unevaluated: those are no error.
            extra = [name for name in error.instance if name not in self._declared(error.schema)]
            names = ", ".join(repr(name) for name in extra)
            return f"{path}: additional properties {names} not allowed" if extra else ""
        return f"{path}: {error.message}"

    def _declared(self, schema: dict[str, Any]) -> set[str]:
        schema = self._resolve(schema)
        parts = [self._declared(part) for part in schema.get("allOf", [])]
        return set(schema.get("properties", {})).union(*parts)


def _absolute(schema: Any) -> Any:
    """References to the file's own parts as references from anywhere."""
    if isinstance(schema, dict):
        return {
            name: _SPEC + value if name == "$ref" and value.startswith("#") else _absolute(value)
            for name, value in schema.items()
        }
    return [_absolute(value) for value in schema] if isinstance(schema, list) else schema


def _leaves(errors: Iterator[ValidationError]) -> Iterator[ValidationError]:
    for error in errors:
        if error.context:
            yield from _leaves(iter(error.context))
        else:
            yield error


def _parsed(text: str, schema: dict[str, Any]) -> Any:
    if schema.get("type") == "array":
        return text.split(",")
    if schema.get("type") == "integer":
        return int(text) if text.lstrip("-").isdigit() else text
    if schema.get("type") == "boolean":
        return {"true": True, "false": False}.get(text, text)
    return text
