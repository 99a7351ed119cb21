"""The calculator that the model may call: arithmetic, and `.count` on strings. Nothing else.

What a model writes is untrusted input: its user may have steered it. Two walls stand between it
and this process. The expression's syntax tree is checked against a list of what is allowed, and
what passes runs in pydantic-monty, a Python interpreter in a worker process with limits on time and
memory (no files, no network, no imports; a worker that crashes is replaced). The result's
length is bounded too: 2**9999999 is small to compute and 3 MB to print.
"""

from __future__ import annotations

import ast
import math
import os
import re
import threading
from dataclasses import dataclass
from typing import ClassVar

from pydantic_monty import Monty, MontyCrashedError, MontyError, ResourceLimits

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_SIGNS = (ast.UAdd, ast.USub)

# 1,234,567 is a number to people and a tuple to Python.
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")


@dataclass(frozen=True, slots=True)
class Result:
    """What the expression is worth, as the text that the model gets to read."""

    text: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """The expression has no result: why."""

    reason: str


class _NotAllowed(ValueError):
    pass


class Calculator:
    """Evaluates expressions within bounds; never raises. Safe to use from several threads.

    time_limit_s, memory_limit_bytes: for one expression, enforced inside the worker (and from
    outside, a second later, by ending the worker). workers: expressions that are worked on at the
    same time; more of them wait. The first worker starts with the first expression. It
    does not survive a fork: a process forked after that gets refusals (start processes by spawn).
    """

    # The process in which the interpreter's runtime was started. Using it in a forked copy hangs.
    _started_in: ClassVar[int | None] = None

    def __init__(
        self,
        *,
        time_limit_s: float = 1.0,
        memory_limit_bytes: int = 8 * 1024 * 1024,
        max_expression_chars: int = 256,
        max_result_chars: int = 64,
        workers: int = 2,
    ) -> None:
        self.workers = workers
        self.max_expression_chars = max_expression_chars
        self.max_result_chars = max_result_chars
        self._limits = ResourceLimits(
            max_feed_duration_secs=time_limit_s, max_memory=memory_limit_bytes, max_recursion_depth=200
        )
        self._request_timeout_s = time_limit_s + 1.0
        self._lock = threading.Lock()
        self._pool: Monty | None = None

    def evaluate(self, expression: str) -> Result | Refusal:
        """The value of `expression`, integers in full, other numbers to 12 significant digits."""
        try:
            code = self._checked(expression)
        except _NotAllowed as error:
            return Refusal(str(error))
        value = self._run(code)
        return value if isinstance(value, Refusal) else self._render(value)

    def close(self) -> None:
        """End the worker; a later expression starts another."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.__exit__(None, None, None)

    def _checked(self, expression: str) -> str:
        expression = expression.strip()
        if len(expression) > self.max_expression_chars:
            raise _NotAllowed(f"the expression is longer than {self.max_expression_chars} characters")
        if "'" not in expression and '"' not in expression:
            expression = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), expression)
        if "\\" in expression:
            raise _NotAllowed("escapes are not allowed")
        try:
            tree = ast.parse(expression, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise _NotAllowed(f"not an expression: {error}") from error
        _check(tree.body)
        return expression

    def _run(self, code: str) -> object:
        if Calculator._started_in not in (None, os.getpid()):
            return Refusal("the calculator was started before this process was forked")
        # Ctrl-C in a terminal ends the worker too (it is in the same process group), which shows
        # only now; the pool replaces it, so a second try answers.
        for _ in range(2):
            try:
                with self._opened().checkout(limits=self._limits) as session:
                    return session.feed_run(code)
            except MontyCrashedError as error:
                if error.timed_out:
                    return Refusal("took too long")
            except (MontyError, OSError, RuntimeError) as error:
                return Refusal(str(error).split("\n", 1)[0][:200])
        return Refusal("the calculator's worker crashed")

    def _opened(self) -> Monty:
        with self._lock:
            if self._pool is None:
                Calculator._started_in = os.getpid()
                pool = Monty(
                    max_processes=self.workers,
                    checkout_timeout=self._request_timeout_s,
                    request_timeout=self._request_timeout_s,
                )
                self._pool = pool.__enter__()
            return self._pool

    def _render(self, value: object) -> Result | Refusal:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Refusal(f"the result is no real number but {type(value).__name__}")
        if isinstance(value, float):
            if not math.isfinite(value):
                return Refusal("the result is not finite")
            # 48/2 is 24 to whoever asks, and in GSM8K's answers, not 24.0.
            text = f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
            return Result("0" if text == "-0" else text)
        # The size is compared before the conversion: str() of a huge integer is slow, or raises.
        if abs(value) >= 10**self.max_result_chars:
            return Refusal(f"the result has more than {self.max_result_chars} digits")
        return Result(str(value))


def _check(node: ast.expr) -> None:
    """Raises _NotAllowed unless `node` is made of numbers, arithmetic and counts on literal strings."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
            _check(left)
            _check(right)
        case ast.UnaryOp(op=op, operand=operand) if isinstance(op, _SIGNS):
            _check(operand)
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str()), attr="count"),
            args=[ast.Constant(value=str())],
            keywords=[],
        ):
            return
        case _:
            raise _NotAllowed(f"{type(node).__name__} is not allowed; only arithmetic and 'text'.count('x')")
