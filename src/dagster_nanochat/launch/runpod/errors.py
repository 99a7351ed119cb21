"""What RunPod may refuse, one class for each thing that a caller does about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

API_KEY_ENV = "RUNPOD_API_KEY"
API_URL_ENV = "RUNPOD_API_URL"
# RunPod's sentence for "nothing free"; the status, 400, is that of a broken rule too.
NO_INSTANCES = "no longer any instances available"
# And its words for too many workers, with the same status.
WORKERS_QUOTA = "workers quota"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What an answer said of its failure (application/problem+json), as far as it did."""

    status: int | None = None
    title: str | None = None
    detail: str | None = None
    errors: tuple[str, ...] = ()
    request_id: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        head = " ".join(str(part) for part in (self.status and f"HTTP {self.status}", self.title) if part)
        text = ": ".join(part.rstrip(".") for part in (head, self.detail, "; ".join(self.errors)) if part)
        return f"{text} (request {self.request_id})" if self.request_id else text


class RunPodError(Exception):
    """A call to RunPod that failed. Everything that the answer said is in the message and in `problem`."""

    advice: ClassVar[str] = ""

    def __init__(self, what: str, problem: Problem | None = None, *, advice: str | None = None) -> None:
        self.what = what
        self.problem = problem or Problem()
        said = str(self.problem)
        last = self.advice if advice is None else advice
        super().__init__(f"{f'{what}: {said}' if said else what}{f'. {last}' if last else ''}")

    @property
    def status(self) -> int | None:
        return self.problem.status

    @property
    def title(self) -> str | None:
        return self.problem.title

    @property
    def detail(self) -> str | None:
        return self.problem.detail

    @property
    def errors(self) -> tuple[str, ...]:
        return self.problem.errors

    @property
    def request_id(self) -> str | None:
        return self.problem.request_id

    @property
    def retry_after_s(self) -> float | None:
        return self.problem.retry_after_s


class Unauthorized(RunPodError):
    """401: no candidate will do."""

    advice = (
        f"RunPod does not know this key. {API_KEY_ENV} must hold a key of your account with the right to "
        "create pods; make one in RunPod's console under Settings, API Keys"
    )


class InsufficientBalance(RunPodError):
    """402: no candidate will do."""

    advice = (
        "The account's balance is too low: RunPod starts a machine only with credit for at least an hour of "
        "it. Add credit in RunPod's console under Billing, or choose a cheaper GPU"
    )


class Forbidden(RunPodError):
    """403: another candidate may be allowed."""

    advice = (
        f"The key in {API_KEY_ENV} is known but may not do this: give it read and write rights in RunPod's "
        "console, or choose another GPU type or cloud"
    )


class NotFound(RunPodError):
    """404."""

    advice = "It is gone already, or belongs to another account"


class Conflict(RunPodError):
    """409: not in this state, or a member of a cluster (which is deleted as a whole)."""


class Invalid(RunPodError):
    """422: the body is wrong, and is so for every candidate."""

    advice = "RunPod does not take this request, whatever the GPU: mend the named settings"


class NoCapacity(RunPodError):
    """400 with the sentence that nothing is free: the next candidate, or later."""

    advice = "Nothing of the kind is free just now: allow more GPU types, clouds or data centers, or wait"


class RuleViolation(RunPodError):
    """Any other 400. Where every candidate gets one, its detail says what is wrong with the request."""


class QuotaExceeded(RunPodError):
    """400 with the sentence that the account's endpoints may not have so many workers."""

    advice = (
        "All endpoints of an account share so many workers. Remove an endpoint that is no longer needed "
        "(`nanochat endpoints ls`, `nanochat endpoints rm MODEL`, or RunPod's console), lower max_workers of "
        "serverless_endpoint, or add credit: the quota grows with the balance"
    )


class RateLimited(RunPodError):
    """429, and not over within the time that the client waits: see `retry_after_s`."""

    advice = "Too many requests of this account in the time RunPod allows for them; wait, and ask less often"


class Unavailable(RunPodError):
    """5xx of a request that may be repeated, or no connection: nothing was created."""

    advice = f"RunPod is down or cannot be reached; try again later, and look at {API_URL_ENV} if it is set"


class MaybeCreated(RunPodError):
    """Nobody knows whether the machine was created: look for its token before trying again."""

    advice = (
        "The machine may have been created all the same, and cost money: list what there is by the launch "
        "token, and adopt or delete it, before another is asked for"
    )


_BY_STATUS: Mapping[int, type[RunPodError]] = {
    401: Unauthorized,
    402: InsufficientBalance,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    422: Invalid,
    429: RateLimited,
}
_ADVICE: Mapping[int, str] = {
    410: f"This version of the API is retired. {API_URL_ENV}, if set, must end in /v2",
    413: "The request is larger than the 100 KiB that RunPod takes: pass less in the environment",
}


def refusal(what: str, problem: Problem) -> RunPodError:
    """The error of an answer that is no success."""
    status = problem.status or 0
    if status == 400:
        detail = (problem.detail or "").lower()
        if WORKERS_QUOTA in detail:
            return QuotaExceeded(what, problem)
        return (NoCapacity if NO_INSTANCES in detail else RuleViolation)(what, problem)
    if status >= 500:
        return Unavailable(what, problem)
    if 300 <= status < 400:
        return RunPodError(what, problem, advice=f"An API does not redirect: look at {API_URL_ENV}")
    return _BY_STATUS.get(status, RunPodError)(what, problem, advice=_ADVICE.get(status))


def problem_of(status: int, document: Any, text: str, headers: Mapping[str, str]) -> Problem:
    """Read an answer's failure; `document` is its JSON, or None where it has none."""
    said = document if isinstance(document, dict) else {}
    listed = said.get("errors")
    return Problem(
        status=status,
        title=_text(said.get("title")),
        # The API of jobs says `error`.
        detail=_text(said.get("detail"))
        or _text(said.get("error"))
        or (None if said else _text(text.strip()[:300])),
        errors=tuple(str(error) for error in listed) if isinstance(listed, list) else (),
        request_id=headers.get("x-request-id"),
        retry_after_s=_seconds(headers.get("retry-after")),
    )


def _text(value: Any) -> str | None:
    return str(value) if value else None


def _seconds(text: str | None) -> float | None:
    # RunPod sends whole seconds. The date that HTTP allows as well is read as "not said".
    return float(text) if text and text.isdecimal() else None
