from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from standins.hostile import HOSTILE

from nanochat.inference.calculator import Calculator, Refusal, Result


@pytest.fixture(scope="module")
def calculator() -> Iterator[Calculator]:
    calculator = Calculator()
    yield calculator
    calculator.close()


def workers() -> dict[int, int]:
    """The calculator's worker processes below this one: pid to resident KiB."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,rss=,comm="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()]
    return {
        int(pid): int(rss)
        for pid, parent, rss, name in rows
        if int(parent) == os.getpid() and "monty" in name and "defunct" not in name
    }


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("1+1", "2"),
        (" 12*34 ", "408"),
        ("48/2", "24"),
        ("0.1+0.2", "0.3"),
        ("2/3", "0.666666666667"),
        ("-7//2", "-4"),
        ("7%4", "3"),
        ("2**10", "1024"),
        ("(1+2)*(3-4)", "-3"),
        ("-0.0", "0"),
        ("1,234+1", "1235"),
        ("1,234,567*2", "2469134"),
        ("2**200", str(2**200)),
        ("1e300", "1e+300"),
        ("'strawberry'.count('r')", "3"),
        (' "hello".count("l")', "2"),
        ("'a,b,c'.count(',')", "2"),
        ("'été'.count('é')", "2"),
        ("'ab'.count('a')+'ab'.count('b')", "2"),
    ],
)
def test_arithmetic_and_counts_have_results(calculator: Calculator, expression: str, text: str) -> None:
    assert calculator.evaluate(expression) == Result(text)


def test_hostile_expressions_are_refused_within_their_bounds(calculator: Calculator) -> None:
    calculator.evaluate("1")
    before = set(workers())
    for expression in HOSTILE:
        begin = time.monotonic()
        outcome = calculator.evaluate(expression)
        # A comment is no way in, so an expression may be followed by one.
        expected = Result if expression.startswith("1 #") else Refusal
        assert isinstance(outcome, expected), (expression, outcome)
        assert time.monotonic() - begin < 2.5, expression
    after = workers()
    assert set(after) == before
    assert all(resident_kib < 200 * 1024 for resident_kib in after.values())
    assert calculator.evaluate("1+1") == Result("2")


def test_a_refusal_says_why(calculator: Calculator) -> None:
    assert calculator.evaluate("1/0") == Refusal("ZeroDivisionError: division by zero")
    refused = calculator.evaluate("open('x')")
    assert isinstance(refused, Refusal)
    assert "only arithmetic" in refused.reason


def test_an_interrupted_or_killed_worker_is_replaced(calculator: Calculator) -> None:
    calculator.evaluate("1")
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        assert workers()
        for pid in workers():
            os.kill(pid, signal_number)
        assert calculator.evaluate("2+2") == Result("4")


def test_it_works_from_threads_at_once(calculator: Calculator) -> None:
    outcomes: dict[int, Result | Refusal] = {}

    def work(number: int) -> None:
        outcomes[number] = calculator.evaluate(f"{number}*2")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {number: Result(str(2 * number)) for number in range(16)}


def test_a_forked_process_gets_a_refusal_and_does_not_hang() -> None:
    code = (
        "import os\n"
        "from nanochat.inference.calculator import Calculator, Refusal\n"
        "used, fresh = Calculator(), Calculator()\n"
        "used.evaluate('1')\n"
        "if os.fork() == 0:\n"
        "    refused = [isinstance(c.evaluate('1'), Refusal) for c in (used, fresh)]\n"
        "    os._exit(0 if all(refused) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 0\n"
        "print(used.evaluate('1+1').text, fresh.evaluate('1+2').text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2 3\n"


def test_a_closed_calculator_starts_again_when_asked() -> None:
    calculator = Calculator()
    assert calculator.evaluate("1+2") == Result("3")
    calculator.close()
    calculator.close()
    assert calculator.evaluate("1+3") == Result("4")
    calculator.close()


def test_a_missing_interpreter_is_a_refusal_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONTY_BIN", "/nonexistent/monty")
    outcome = Calculator().evaluate("1+1")
    assert isinstance(outcome, Refusal)
    assert outcome.reason
