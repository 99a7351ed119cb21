"""Errors as OpenAI's clients know them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Mapping

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told. param: the field of its request that is at fault. headers: of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def document(self) -> dict[str, dict[str, str | None]]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _KINDS.get(self.status, kind)
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


def bad_field(param: str, message: str, *, code: str = "invalid_value") -> ApiError:
    """A request that can be read, and asks for what cannot be had."""
    return ApiError(400, f"{param}: {message}", code=code, param=param)


def bad_value(error: ValueError) -> ApiError:
    """What the engine refuses: its messages on a field read "<field> must …"."""
    message = str(error)
    field, found, _ = message.partition(" must ")
    param = field if found and field.isidentifier() else None
    return ApiError(400, message, code="invalid_value", param=param)


def overloaded(message: str, *, code: str = "overloaded") -> ApiError:
    """Nothing is wrong with the request, and a little later it may be answered."""
    return ApiError(503, message, code=code, headers={"Retry-After": "1"})
