"""The chat page in a real browser, before a server whose models say what a script says.

Set ``NANOCHAT_SCREENSHOTS`` to a folder to keep what was seen.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from standins.served_script import running
from standins.talking_model import TalkingModel
from standins.waiting import wait_for

from nanochat.inference.chat import load_engine
from nanochat.inference.scheduler import Scheduler
from nanochat.serving.app import ServedModel, Serving
from nanochat.serving.gate import Limits
from nanochat.serving.protocol import Defaults
from nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request, Route

    from nanochat.store import ObjectStore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)"),
    pytest.mark.timeout(120),
]

CALL = "<|python_start|>12+30<|python_end|><|output_start|>42<|output_end|>"
MARKDOWN = """# Title

Some **bold**, *italic*, `code` and [a link](https://example.org/a_(b)).

1. one
   - nested
2. two

```python
x = "<b>"
```

| a | b |
|---|---|
| 1 | 2 |

> said
"""
HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)><iframe src="//evil.test"></iframe>
[go](javascript:alert(3)) [so](JaVaScRiPt:alert(4)) [da](data:text/html,<script>alert(5)</script>)
[tab](java\tscript:alert(6)) <a href="javascript:alert(7)">x</a> [vb](vbscript:alert(8))
![pixel](https://evil.test/pixel.png) ![x](x" onerror="alert(9))
[quote](https://evil.test/" onmouseover="alert(10)) **<svg onload=alert(11)>**

```"><script>alert(12)</script>
</code></pre><script>alert(13)</script>
```

| <img src=//evil.test/a onerror=alert(14)> | b |
|---|---|
| <style>@import "//evil.test/c"</style> | <base href="//evil.test"> |

# <form action="//evil.test"><button>press</button></form>
&lt;script&gt;alert(15)&lt;/script&gt; <meta http-equiv=refresh content="0;url=//evil.test">
"""
SAYS = {
    "What is your name?": "I am NanoChat 😀.",
    "What is 12 + 30?": f"Let me see. {CALL}It is 42.",
    "Show me": MARKDOWN,
    "Attack": HOSTILE,
    "Go on": "word " * 120,
    "Once upon": " a time there was a model.",
}


class Site:
    """A server with the model `tiny`, which chats, `other`, which says its name, and `tiny:base`."""

    def __init__(self, url: str, models: dict[str, TalkingModel]) -> None:
        self.url = url
        self.tiny, self.other, self.base = models.values()


@pytest.fixture(scope="module")
def serve(byte_tokenizer: Tokenizer, spell: Callable[[str], list[int]]) -> Callable[..., Any]:
    """serve(**serving): a context that holds a Site and its server."""

    @contextlib.contextmanager
    def start(max_waiting: int = 8, max_rows: int = 4, **how: Any) -> Iterator[tuple[Site, Any]]:
        says = {
            "tiny": SAYS,
            "other": {**SAYS, "What is your name?": "Other."},
            "tiny:base": SAYS,
        }
        models = {
            name: TalkingModel(byte_tokenizer, spell, answers, 1024 if name == "tiny" else 128)
            for name, answers in says.items()
        }
        with contextlib.ExitStack() as stack:
            served = [
                ServedModel(
                    name,
                    stack.enter_context(
                        Scheduler(model, byte_tokenizer, max_rows=max_rows, max_waiting=max_waiting)
                    ),
                    ":" not in name,
                )
                for name, model in models.items()
            ]
            stack.callback(lambda: [model.let(None) for model in models.values()])
            defaults = Defaults(max_tokens=1000, temperature=0.0, top_k=None)
            url, server = stack.enter_context(running(served, Serving(**{"defaults": defaults, **how})))
            yield Site(url, models), server

    return start


@pytest.fixture(scope="module")
def site(serve: Callable[..., Any]) -> Iterator[Site]:
    with serve() as (site, _):
        yield site


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Visitor:
    """Somebody with a browser window, who sees what a reader of the page sees."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.requests: list[Request] = []
        self.surprises: list[str] = []
        page.set_default_timeout(40_000)
        page.on("request", lambda request: self.requests.append(request))
        page.on("dialog", lambda dialog: (self.surprises.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self.surprises.append(str(error)))
        page.on("popup", lambda popup: self.surprises.append(popup.url))
        page.on(
            "console",
            lambda said: (
                said.type == "error"
                and "Failed to load resource" not in said.text
                and self.surprises.append(said.text)
            ),
        )

    def open(self, path: str = "/") -> Visitor:
        self.page.goto(self.url + path)
        self.page.locator("#pickers select").first.wait_for()
        return self

    @property
    def message(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.locator(".answer")

    def send(self, question: str) -> None:
        """Ask, and leave it at that."""
        self.message.fill(question)
        self.message.press("Enter")

    def ask(self, question: str) -> str:
        """Ask, and read the last answer when it is whole."""
        self.send(question)
        return self.read()

    def read(self) -> str:
        self.page.locator("#send").wait_for()
        return self.answers.last.locator(".body").inner_text()

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of what was asked of the models, in order."""
        bodies = [request.post_data_json for request in self.requests if request.method == "POST"]
        return [body for body in bodies if body is not None]

    @property
    def told(self) -> str:
        """What those who hear the page were told last."""
        return self.page.locator("#announce").inner_text()

    def kept(self) -> list[dict[str, Any]]:
        """The chats that the browser keeps."""
        chats: list[dict[str, Any]] = self.page.evaluate(
            "Object.entries(localStorage).filter(([key]) => key.startsWith('nanochat.chat.'))"
            ".map(([, value]) => JSON.parse(value))"
        )
        return chats

    def keep(self, name: str) -> None:
        if folder := os.environ.get("NANOCHAT_SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Callable[..., Visitor]]:
    """visit(url=…, width=…, …): a Visitor with a browser of their own, who must meet no surprises."""
    visitors: list[Visitor] = []

    def start(url: str = site.url, *, width: int = 1200, height: int = 800, **context: Any) -> Visitor:
        opened = browser.new_context(viewport={"width": width, "height": height}, **context)
        visitors.append(Visitor(opened.new_page(), url))
        return visitors[-1]

    yield start
    for model in (site.tiny, site.other, site.base):
        model.let(None)
    for visitor in visitors:
        visitor.page.context.close()
        assert visitor.surprises == []
        elsewhere = [each.url for each in visitor.requests if not each.url.startswith(visitor.url + "/")]
        assert elsewhere == []


# -- asking ----------------------------------------------------------------------------------------


def test_an_answer_comes_while_it_is_written_and_its_speed_is_shown(
    visit: Callable[..., Visitor], site: Site
) -> None:
    visitor = visit().open()
    site.tiny.let(8)
    visitor.send("What is your name?")
    body = visitor.answers.locator(".body")
    body.get_by_text("I am Na").wait_for()
    assert visitor.answers.get_attribute("aria-busy") == "true"
    assert visitor.told == "tiny is answering."
    site.tiny.let(None)
    assert visitor.read() == "I am NanoChat 😀."
    assert visitor.answers.get_attribute("aria-busy") == "false"
    stats = visitor.answers.locator(".stats").inner_text()
    assert re.fullmatch(r"\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ m?s", stats), stats
    assert visitor.told == "tiny: I am NanoChat 😀."
    assert re.fullmatch(r"\d+ of 1024 tokens", visitor.page.locator(".used").inner_text())


def test_what_was_said_before_is_sent_along(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    assert visitor.ask("First") == "Questions so far: 1."
    assert visitor.ask("Second") == "Questions so far: 2."
    assert [message["content"] for message in visitor.asked[-1]["messages"]] == [
        "First",
        "Questions so far: 1.",
        "Second",
    ]


def test_stop_ends_an_answer_keeps_what_there_is_and_frees_the_model(
    visit: Callable[..., Visitor], site: Site
) -> None:
    visitor = visit().open()
    for end in (lambda: visitor.button("Stop").click(), lambda: visitor.page.keyboard.press("Escape")):
        site.tiny.let(12)
        visitor.send("Go on")
        visitor.answers.last.get_by_text("word").wait_for()
        end()
        visitor.answers.last.get_by_text("Stopped.").wait_for()
        site.tiny.let(None)
        assert visitor.read().startswith("word")
        assert len(visitor.read()) < 60
        wait_for(lambda: 'nanochat_running{model="tiny"} 0.0' in httpx.get(f"{site.url}/metrics").text)
    assert visitor.ask("What is your name?") == "I am NanoChat 😀."


def test_retry_asks_the_same_again_in_the_place_of_the_last_answer(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    visitor.ask("First")
    visitor.ask("What is your name?")
    assert visitor.button("Answer again").count() == 1
    visitor.button("Answer again").click()
    assert visitor.read() == "I am NanoChat 😀."
    visitor.page.keyboard.press("Alt+r")
    assert visitor.read() == "I am NanoChat 😀."
    assert visitor.answers.count() == 2
    assert visitor.asked[-1] == visitor.asked[-2] == visitor.asked[-3]


def test_an_edited_question_replaces_it_and_what_came_after_it(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    for question in ("First", "Second", "Third"):
        visitor.ask(question)
    visitor.button("Edit the question").nth(1).click()
    edit = visitor.page.get_by_label("Edit the question", exact=True).and_(visitor.page.locator("textarea"))
    assert edit.input_value() == "Second"
    assert visitor.page.get_by_text("The turn below goes.").is_visible()
    edit.press("Escape")
    assert visitor.answers.count() == 3
    visitor.button("Edit the question").nth(1).click()
    edit.fill("What is your name?")
    edit.press("Enter")
    visitor.answers.nth(2).wait_for(state="detached")
    assert visitor.read() == "I am NanoChat 😀."
    assert visitor.page.locator(".bubble").all_inner_texts() == ["First", "What is your name?"]
    assert len(visitor.asked[-1]["messages"]) == 3
    (kept,) = visitor.kept()
    assert [turn["question"] for turn in kept["turns"]] == ["First", "What is your name?"]


def test_a_calculation_is_shown_as_one(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    visitor.ask("What is 12 + 30?")
    call = visitor.page.get_by_role("group", name="Calculator")
    assert call.inner_text().split() == ["Calculator", "12+30", "=", "42"]
    assert visitor.answers.locator(".body > p").all_inner_texts() == ["Let me see.", "It is 42."]
    visitor.keep("calculation")
    visitor.ask("And?")
    assert visitor.asked[-1]["messages"][1]["content"] == "Let me see. It is 42."


def test_settings_reach_the_request_and_are_kept(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    visitor.ask("First")
    assert set(visitor.asked[-1]) == {"model", "messages", "stream", "stream_options"}
    dialog = visitor.page.get_by_role("dialog", name="Settings of tiny")
    visitor.page.keyboard.press("Alt+s")
    wishes = {"Temperature": "0.7", "Top-k": "5", "Top-p": "0.9", "Repetition penalty": "1.2"}
    for label, value in {**wishes, "Max tokens": "4", "Seed": "11"}.items():
        dialog.get_by_label(label).fill(value)
    dialog.get_by_label("Stop at").fill("###\n END")
    dialog.get_by_label("System message").fill("Be brief.")
    visitor.keep("settings")
    visitor.button("Save").click()
    visitor.page.reload()
    visitor.ask("Go on")
    asked = visitor.asked[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {
        name: asked[name] for name in asked if name not in ("model", "messages", "stream", "stream_options")
    } == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "max_tokens": 4,
        "seed": 11,
        "stop": ["###", " END"],
    }
    assert visitor.answers.last.get_by_text("The answer was cut after 4 tokens").is_visible()
    visitor.page.keyboard.press("Alt+s")
    visitor.button("Back to the server's").click()
    visitor.button("Save").click()
    visitor.ask("What is your name?")
    assert set(visitor.asked[-1]) == {"model", "messages", "stream", "stream_options"}


def test_a_setting_that_cannot_be_is_not_saved(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    visitor.page.keyboard.press("Alt+s")
    dialog = visitor.page.get_by_role("dialog")
    for label, value in {"Temperature": "-1", "Max tokens": "1001", "Stop at": "a\nb\nc\nd\ne"}.items():
        before = dialog.get_by_label(label).input_value()
        dialog.get_by_label(label).fill(value)
        visitor.button("Save").click()
        assert dialog.is_visible()
        dialog.get_by_label(label).fill(before)
    visitor.page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")


def test_the_model_can_be_chosen_and_a_base_model_continues_a_text(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    choice = visitor.page.get_by_label("Model", exact=True)
    assert choice.locator("option").all_inner_texts() == ["tiny", "other", "tiny:base"]
    choice.select_option("other")
    assert visitor.ask("What is your name?") == "Other."
    choice.select_option("tiny:base")
    assert visitor.ask("Once upon") == "a time there was a model."
    assert visitor.asked[-1]["prompt"] == "Once upon"
    assert visitor.answers.locator(".who").all_inner_texts() == ["other", "tiny:base"]
    visitor.page.reload()
    visitor.page.locator("#pickers select").wait_for()
    assert choice.input_value() == "tiny:base"


# -- what does not fit, and what goes wrong --------------------------------------------------------


def test_a_full_context_is_told_and_the_oldest_turns_are_left_out_then(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    visitor.page.get_by_label("Model", exact=True).select_option("other")
    visitor.ask("Go on")
    alert = visitor.answers.first.get_by_role("alert")
    assert "The model's context of 128 tokens is full" in alert.inner_text()
    visitor.page.reload()
    assert "The model's context of 128 tokens is full" in alert.inner_text()
    visitor.keep("full")
    assert visitor.ask("What is your name?") == "Other."
    assert [message["content"] for message in visitor.asked[-1]["messages"]] == ["What is your name?"]
    assert visitor.answers.last.get_by_text("The first question and its answer no longer fit").is_visible()
    visitor.send("x" * 200)
    assert "200" not in visitor.read()
    assert "this model reads 128" in visitor.answers.last.get_by_role("alert").inner_text()
    alert.get_by_role("button", name="New chat").click()
    assert visitor.answers.count() == 0


def test_what_the_server_refuses_for_its_length_is_asked_again_without_the_oldest_turns(
    visit: Callable[..., Visitor],
) -> None:
    visitor = visit().open()
    visitor.page.get_by_label("Model", exact=True).select_option("other")
    visitor.ask("What is your name?")
    # Of these characters three tokens each, where those before had one.
    assert visitor.ask("漢" * 34) == "Questions so far: 1."
    counts = [len(body["messages"]) for body in visitor.asked]
    assert counts == [1, 3, 1]


def test_a_busy_server_is_asked_again_when_it_says(
    visit: Callable[..., Visitor], serve: Callable[..., Any]
) -> None:
    with serve(max_waiting=1, max_rows=1) as (site, _):
        visitor = visit(site.url).open()
        site.tiny.let(0)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        others = [
            threading.Thread(
                target=httpx.post, args=(f"{site.url}/v1/chat/completions",), kwargs={"json": body}
            )
            for _ in range(2)
        ]
        for number, other in enumerate(others):
            other.start()
            figure = f'nanochat_waiting{{model="tiny"}} {number}.0'
            wait_for(lambda figure=figure: figure in httpx.get(f"{site.url}/metrics").text)
            wait_for(lambda number=number: _requests(site.url) == number + 1)
        visitor.send("What is your name?")
        notice = visitor.answers.locator(".notice.busy")
        notice.get_by_text("Asking again in 1 s.").wait_for()
        visitor.keep("busy")
        site.tiny.let(None)
        visitor.answers.get_by_text("I am NanoChat").wait_for()
        assert visitor.read() == "I am NanoChat 😀."
        assert notice.count() == 0
        for other in others:
            other.join()


def _requests(url: str) -> int:
    found = re.search(r'nanochat_requests_total\{model="tiny"\} (\d+)', httpx.get(f"{url}/metrics").text)
    assert found
    return int(found[1])


def test_a_client_with_too_many_requests_waits_as_told_or_stops(
    visit: Callable[..., Visitor], serve: Callable[..., Any]
) -> None:
    with serve(limits=Limits(client_requests_per_minute=1)) as (site, _):
        visitor = visit(site.url).open()
        visitor.ask("What is your name?")
        visitor.send("What is your name?")
        notice = visitor.answers.last.locator(".notice.busy")
        notice.get_by_text(re.compile(r"You may send 1 requests a minute.* Asking again in \d+ s")).wait_for()
        notice.get_by_role("button", name="Now").click()
        wait_for(lambda: len(visitor.asked) == 3)
        notice.wait_for()
        visitor.page.keyboard.press("Escape")
        visitor.answers.last.get_by_text("Stopped.").wait_for()
        assert len(visitor.asked) == 3


def test_a_server_that_is_gone_is_told_and_asked_again_on_request(
    visit: Callable[..., Visitor], serve: Callable[..., Any], site: Site
) -> None:
    with serve() as (gone, _):
        visitor = visit(gone.url).open()
        visitor.ask("What is your name?")
    visitor.send("What is 12 + 30?")
    alert = visitor.answers.last.get_by_role("alert")
    alert.wait_for()
    assert "The server cannot be reached. Is it still running?" in alert.inner_text()
    assert visitor.told == "The server cannot be reached. Is it still running?"
    visitor.keep("gone")

    def answer(route: Route) -> None:
        route.fulfill(response=route.fetch(url=f"{site.url}/v1/chat/completions"))

    visitor.page.route("**/v1/chat/completions", answer)
    alert.get_by_role("button", name="Try again").click()
    visitor.page.get_by_role("group", name="Calculator").wait_for()
    assert visitor.answers.count() == 2


def test_an_answer_that_breaks_off_stays_as_far_as_it_came(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    half = '{"id":"x","choices":[{"index":0,"delta":{"content":"Half an "},"finish_reason":null}]}'
    failure = '{"error":{"message":"the model failed on this request"}}'

    def answer(*chunks: str) -> Callable[[Route], None]:
        body = "".join(f"data: {chunk}\n\n" for chunk in chunks)
        return lambda route: route.fulfill(body=body, headers={"Content-Type": "text/event-stream"})

    for chunks, message in (
        ([half], "The connection broke off in the middle of the answer."),
        ([half, failure], "The model failed on this request."),
    ):
        visitor.page.route("**/v1/chat/completions", answer(*chunks))
        assert visitor.ask("What is your name?") == "Half an"
        assert message in visitor.answers.last.get_by_role("alert").inner_text()


def test_a_key_is_asked_for_and_kept_for_the_tab_only(
    visit: Callable[..., Visitor], serve: Callable[..., Any]
) -> None:
    with serve(api_keys=("secret",)) as (site, _):
        visitor = visit(site.url)
        visitor.page.goto(site.url)
        dialog = visitor.page.get_by_role("dialog", name="This server asks for a key")
        dialog.get_by_label("API key").fill("wrong")
        visitor.keep("key")
        visitor.page.keyboard.press("Enter")
        dialog.get_by_text("That key was not accepted.").wait_for()
        dialog.get_by_label("API key").fill("secret")
        visitor.page.keyboard.press("Enter")
        visitor.page.locator("#pickers select").wait_for()
        assert visitor.ask("What is your name?") == "I am NanoChat 😀."
        visitor.page.reload()
        assert visitor.ask("What is 12 + 30?").endswith("It is 42.")
        assert not dialog.is_visible()
        assert "secret" not in visitor.page.evaluate("JSON.stringify(localStorage)")
        assert visitor.page.evaluate("sessionStorage['nanochat.key']") == "secret"
        visitor.page.evaluate("sessionStorage.clear()")
        visitor.send("What is your name?")
        dialog.get_by_role("button", name="Cancel").click()
        assert "The API key is missing or wrong" in visitor.answers.last.get_by_role("alert").inner_text()


def test_a_server_that_is_not_there_at_the_beginning_can_be_asked_again(
    visit: Callable[..., Visitor],
) -> None:
    visitor = visit()
    visitor.page.route("**/v1/models", lambda route: route.abort())
    visitor.page.goto(visitor.url)
    trouble = visitor.page.get_by_role("alert")
    trouble.get_by_text("The server cannot be reached").wait_for()
    assert visitor.button("Send").is_disabled()
    visitor.page.unroute("**/v1/models")
    trouble.get_by_role("button", name="Try again").click()
    assert visitor.ask("What is your name?") == "I am NanoChat 😀."


# -- chats -----------------------------------------------------------------------------------------


def test_chats_are_kept_in_the_browser_shown_after_a_reload_and_deleted(
    visit: Callable[..., Visitor],
) -> None:
    visitor = visit().open()
    visitor.ask("What is your name?")
    visitor.button("New chat").click()
    assert visitor.answers.count() == 0
    visitor.ask("What is 12 + 30?")
    assert len(visitor.asked[-1]["messages"]) == 1
    visitor.page.reload()
    assert visitor.read().split() == [
        "Let",
        "me",
        "see.",
        "Calculator",
        "12+30",
        "=",
        "42",
        "It",
        "is",
        "42.",
    ]
    chats = visitor.page.get_by_role("navigation", name="Earlier chats").get_by_role("link")
    assert chats.all_inner_texts() == ["What is 12 + 30?", "What is your name?"]
    chats.nth(1).click()
    assert visitor.read() == "I am NanoChat 😀."
    assert visitor.ask("And?") == "Questions so far: 2."
    visitor.page.go_back()
    visitor.page.get_by_role("group", name="Calculator").wait_for()

    visitor.button("Delete “What is 12 + 30?”").click()
    assert visitor.answers.count() == 0
    assert chats.all_inner_texts() == ["What is your name?"]
    visitor.button("Undo").click()
    assert chats.count() == 2
    visitor.button("Delete all chats").click()
    assert chats.count() == 0
    assert visitor.kept() == []
    visitor.page.reload()
    assert chats.count() == 0


def test_a_chat_that_is_left_is_answered_on_and_a_page_that_is_left_keeps_what_came(
    visit: Callable[..., Visitor], site: Site
) -> None:
    visitor = visit().open()
    site.tiny.let(10)
    visitor.send("Go on")
    visitor.answers.get_by_text("word").wait_for()
    visitor.button("New chat").click()
    assert visitor.button("Send").is_visible()
    site.tiny.let(20)
    wait_for(lambda: "done" not in str(visitor.kept()))
    visitor.page.get_by_role("link", name="Go on").click()
    wait_for(lambda: len(visitor.answers.locator(".body").inner_text()) > 15)
    visitor.page.reload()
    visitor.answers.get_by_text("Stopped.").wait_for()
    assert visitor.read().startswith("word word")


def test_what_the_browser_holds_and_is_no_chat_does_no_harm(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    visitor.page.evaluate(
        """Object.entries({ 'nanochat.chat.a': '{"turns": 3}', 'nanochat.chat.b': 'no json',
            'nanochat.columns': '{"1": "a", "2": [null, {}]}', 'nanochat.theme': 'purple',
            'nanochat.chat.c': '{"id":"c","columns":1,"turns":[{"question":"<img src=x onerror=alert(1)>",' +
              '"answers":[{"model":"<b>","parts":[{"type":"text","text":"<script>alert(2)</script>"}],"tokens":1}]}]}',
        }).forEach(([key, value]) => localStorage.setItem(key, value))"""
    )
    visitor.open("/#c")
    assert visitor.read() == "<script>alert(2)</script>"
    assert visitor.page.locator("#chats a").all_inner_texts() == ["<img src=x onerror=alert(1)>"]
    visitor.open("/#nowhere")
    assert visitor.ask("What is your name?") == "I am NanoChat 😀."


def test_when_the_browsers_room_is_full_the_oldest_chats_go(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    visitor.ask("Go on")
    visitor.page.evaluate(
        """() => {
            for (let size = 1 << 22, number = 0; size; number += 1) {
                try { localStorage.setItem(`filling ${number}`, "x".repeat(size)); } catch { size >>= 1; }
            }
        }"""
    )
    visitor.button("New chat").click()
    visitor.ask("Newest")
    assert [chat["turns"][0]["question"] for chat in visitor.kept()] == ["Newest"]


# -- comparing -------------------------------------------------------------------------------------


def test_two_models_answer_the_same_question_side_by_side(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open("/?compare")
    visitor.button("Settings of model b: temperature 0").click()
    visitor.page.get_by_role("dialog").get_by_label("Max tokens").fill("3")
    visitor.button("Save").click()
    visitor.send("What is your name?")
    visitor.read()
    bodies = visitor.answers.locator(".body").all_inner_texts()
    assert bodies == ["I am NanoChat 😀.", "Othe"]
    assert [(body["model"], body.get("max_tokens")) for body in visitor.asked] == [
        ("tiny", None),
        ("other", 3),
    ]
    boxes = [visitor.answers.nth(column).bounding_box() for column in (0, 1)]
    assert boxes[0]
    assert boxes[1]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    speeds = visitor.answers.locator(".stats").all_inner_texts()
    assert re.match(r"\d\d tokens · [\d.]+ tokens/s · first after", speeds[0])
    assert re.match(r"3 tokens · .*first after", speeds[1])
    visitor.keep("compare")
    visitor.send("Second")
    visitor.read()
    assert [len(body["messages"]) for body in visitor.asked[2:]] == [3, 3]
    assert visitor.asked[3]["messages"][1]["content"] == "Othe"
    visitor.button("Answer again").nth(1).click()
    visitor.read()
    assert [body["model"] for body in visitor.asked[4:]] == ["other"]
    visitor.page.reload()
    assert visitor.answers.count() == 4
    visitor.button("New chat").click()
    assert visitor.page.locator("#pickers select").count() == 1
    visitor.page.keyboard.press("Alt+c")
    assert visitor.page.locator("#pickers select").count() == 2


def test_one_column_stops_or_fails_without_the_other(visit: Callable[..., Visitor], site: Site) -> None:
    visitor = visit().open("/?compare")
    site.other.let(0)
    visitor.send("What is your name?")
    visitor.answers.nth(0).get_by_text("I am NanoChat 😀.").wait_for()
    assert visitor.answers.nth(1).get_attribute("aria-busy") == "true"
    visitor.page.keyboard.press("Escape")
    visitor.answers.nth(1).get_by_text("Stopped.").wait_for()
    site.other.let(None)
    assert visitor.answers.nth(0).get_by_text("Stopped.").count() == 0
    visitor.page.get_by_label("Model B", exact=True).select_option("tiny:base")
    visitor.page.get_by_label("Model A", exact=True).select_option("other")
    visitor.send("Once upon")
    visitor.read()
    assert [body.get("prompt") for body in visitor.asked[2:]] == [None, "Once upon"]


# -- what a model may write ------------------------------------------------------------------------


def test_markdown_is_shown_and_code_is_copied(visit: Callable[..., Visitor]) -> None:
    visitor = visit(permissions=["clipboard-read", "clipboard-write"]).open()
    visitor.ask("Show me")
    body = visitor.answers.locator(".body")
    visitor.keep("markdown")
    assert body.get_by_role("heading", name="Title").count() == 1
    assert body.locator("strong").inner_text() == "bold"
    assert body.locator("em").inner_text() == "italic"
    assert body.locator("ol > li > ul > li").inner_text() == "nested"
    assert body.locator("td").all_inner_texts() == ["1", "2"]
    assert body.locator("blockquote").inner_text() == "said"
    link = body.get_by_role("link")
    assert link.get_attribute("href") == "https://example.org/a_(b)"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    pasted = "navigator.clipboard.readText()"
    visitor.button("Copy the code").click()
    visitor.page.get_by_text("Copied.").wait_for()
    assert visitor.page.evaluate(pasted) == 'x = "<b>"'
    visitor.button("Copy the answer").click()
    wait_for(lambda: visitor.page.evaluate(pasted) == MARKDOWN)
    visitor.button("Copy the question").click()
    wait_for(lambda: visitor.page.evaluate(pasted) == "Show me")


def test_hostile_output_does_nothing(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    before = visitor.page.locator("script, img, iframe, style, base, form, meta, link").count()
    visitor.ask("Attack")
    body = visitor.answers.locator(".body")
    visitor.keep("hostile")
    made = set(body.evaluate("body => [...body.querySelectorAll('*')].map(element => element.localName)"))
    assert made <= {
        *("p", "br", "a", "strong", "code", "pre", "div", "span", "button", "svg", "use"),
        *("table", "thead", "tbody", "tr", "th", "td", "h2"),
    }
    assert visitor.page.locator("script, img, iframe, style, base, form, meta, link").count() == before
    attributes = body.evaluate(
        "body => [...body.querySelectorAll('*')].flatMap(element => element.getAttributeNames())"
    )
    assert [name for name in attributes if name.startswith("on") or name in ("src", "style", "srcdoc")] == []
    links = body.locator("a")
    addresses = [links.nth(index).get_attribute("href") or "" for index in range(links.count())]
    assert addresses == ["https://evil.test/pixel.png", "https://evil.test/"]
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in body.inner_text()
    assert body.inner_text().endswith('<meta http-equiv=refresh content="0;url=//evil.test">')
    # What was not asked for (a dialog, a request to elsewhere) is looked for at the end of every test.
    body.locator("p").first.hover()
    visitor.page.wait_for_timeout(200)


def test_the_policy_forbids_what_the_page_does_not_do(visit: Callable[..., Visitor], site: Site) -> None:
    for path in ("/", "/page/main.js", "/page/style.css"):
        answer = httpx.get(site.url + path)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "connect-src 'self'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert httpx.get(site.url + path, headers={"If-None-Match": answer.headers["ETag"]}).status_code in (
            200,
            304,
        )
    page = httpx.get(f"{site.url}/").text
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|https?://(?!www\.w3\.org)", page)
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/nothing.js", "/page/"):
        assert httpx.get(site.url + path).status_code == 404
    visitor = visit().open()
    blocked = visitor.page.evaluate(
        """async () => {
            const blocked = [];
            addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
            const picture = document.createElement("img");
            picture.src = "http://evil.test/x.png";
            document.body.append(picture);
            await fetch("http://evil.test/").catch(() => {});
            try { document.body.innerHTML = "<p>"; } catch { blocked.push("innerHTML"); }
            await new Promise((resolve) => setTimeout(resolve, 200));
            return blocked;
        }"""
    )
    assert set(blocked) == {"img-src", "connect-src", "require-trusted-types-for", "innerHTML"}
    assert not any(each.url.startswith("http://evil.test") and each.response() for each in visitor.requests)
    visitor.requests = [each for each in visitor.requests if "evil.test" not in each.url]
    visitor.surprises = [
        said for said in visitor.surprises if "violates" not in said and "TrustedHTML" not in said
    ]


@pytest.fixture(scope="module")
def render(browser: Browser, site: Site) -> Iterator[Callable[[str], Any]]:
    """render(text): the markup of what the page makes of a text, and the milliseconds that it took."""
    page = browser.new_page()
    page.goto(site.url)
    script = """async (text) => {
        const { render } = await import("/page/markdown.js");
        const start = performance.now();
        const place = document.createElement("div");
        place.append(...render(text));
        return [place.innerHTML, performance.now() - start];
    }"""
    yield lambda text: page.evaluate(script, text)
    page.close()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
        ("# A #\n## B\n#c", "<h2>A</h2><h3>B</h3><p>#c</p>"),
        (
            "**a *b* c** ***d*** ~~e~~",
            "<p><strong>a <em>b</em> c</strong> <strong><em>d</em></strong> <del>e</del></p>",
        ),
        ("2 * 3 * 4, snake_case_name, a** b, *open", "<p>2 * 3 * 4, snake_case_name, a** b, *open</p>"),
        ("**a *b** c*", "<p><strong>a *b</strong> c*</p>"),
        (r"\*a\* `\*` ``a`b``", "<p>*a* <code>\\*</code> <code>a`b</code></p>"),
        ("`*a` *b`", "<p><code>*a</code> *b`</p>"),
        (
            "- a\n- b\n  - c\n\n1. d\n2. e",
            "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li><li>e</li></ol>",
        ),
        ("3. a\n\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("It was\n1984. A year", "<p>It was<br>1984. A year</p>"),
        ("> a\n> > b\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a\n\n---\n\n* * *", "<p>a</p><hr><hr>"),
        ("a | b\nc", "<p>a | b<br>c</p>"),
        ("&amp; <b>", "<p>&amp;amp; &lt;b&gt;</p>"),
        ("[a](/b) [c](javascript:d) [e]( f", "<p>[a](/b) [c](javascript:d) [e]( f</p>"),
        ("", ""),
    ],
)
def test_markdown_becomes_elements(render: Callable[[str], Any], text: str, html: str) -> None:
    assert render(text)[0] == html


def test_an_address_in_a_sentence_is_a_link_without_the_sentences_marks(
    render: Callable[[str], Any],
) -> None:
    html, _ = render("See https://a.test/b?c=1&d, (http://e.test) and **https://f.test/g**. xhttps://no.test")
    assert re.findall(r'href="([^"]*)"[^>]*>([^<]*)<', html) == [
        ("https://a.test/b?c=1&amp;d", "https://a.test/b?c=1&amp;d"),
        ("http://e.test/", "http://e.test"),
        ("https://f.test/g", "https://f.test/g"),
    ]


def test_code_that_has_not_ended_is_code_already(render: Callable[[str], Any]) -> None:
    assert "<pre" in render("```py\nx = 1")[0]
    assert ">x = 1\n```\ny</code>" in render("````\nx = 1\n```\ny")[0]


# Each of them over and over is what some Markdown reader takes a quadratic time for.
SLOW = (
    *("*", "**a ", "*a **b ", "_", "[", "![", "[a](", "`", "` `` ", "> ", "- ", "~~a", "|", "| a |\n|---|\n"),
    *("1. ", "  - a\n", "http://", "https://a.test/((", "<", "\\", "#", "# #", "***a** ", "[a](b(", "\n"),
)


@pytest.mark.parametrize("piece", SLOW)
def test_text_that_is_made_to_be_slow_is_not(render: Callable[[str], Any], piece: str) -> None:
    _, took_ms = render(piece * (40_000 // len(piece)))
    assert took_ms < 3000


def test_nesting_has_an_end(render: Callable[[str], Any]) -> None:
    html, _ = render("> " * 500 + "a\n\n" + "- " * 500 + "b\n\n" + "*c _" * 500)
    assert (html.count("<blockquote>"), html.count("<ul>")) == (8, 8)
    assert 0 < html.count("<em>") < 20


# -- for everybody ---------------------------------------------------------------------------------


def test_everything_can_be_done_by_keyboard(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open()
    page, keys = visitor.page, visitor.page.keyboard
    focused = "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent.trim()"
    assert page.evaluate("document.activeElement.id") == "message"
    keys.type("What is")
    keys.press("Shift+Enter")
    keys.type("your name?")
    assert visitor.message.input_value() == "What is\nyour name?"
    keys.press("Enter")
    assert visitor.read() == "Questions so far: 1."
    keys.press("ArrowUp")
    keys.press("Control+a")
    keys.type("What is your name?")
    keys.press("Enter")
    visitor.answers.get_by_text("I am NanoChat").wait_for()
    visitor.read()
    keys.press("Alt+n")
    assert visitor.answers.count() == 0
    page.evaluate("document.activeElement.blur()")
    keys.press("?")
    page.get_by_role("dialog", name="Keyboard shortcuts").wait_for()
    visitor.keep("shortcuts")
    keys.press("Escape")
    page.evaluate("document.activeElement.blur()")
    keys.press("/")
    assert page.evaluate("document.activeElement.id") == "message"

    # From the beginning of the page, one Tab after another, every control is reached and its focus is seen.
    page.locator(".skip").focus()
    reached = [page.evaluate(focused)]
    while "Send" not in reached:
        keys.press("Tab")
        reached.append(page.evaluate(focused))
        outline = page.evaluate(
            """() => {
                const at = document.activeElement;
                const styles = [at, at.nextElementSibling, at.closest("form")]
                    .filter(Boolean).map((element) => getComputedStyle(element));
                return styles.some((style) => style.outlineStyle === "solid" || style.boxShadow !== "none");
            }"""
        )
        assert outline, reached[-1]
        assert len(reached) < 30, reached
    assert reached[:4] == ["Skip to the message", "New chat", "Compare two", "What is your name?"]
    assert {"Delete “What is your name?”", "Keyboard shortcuts", "Delete all chats"} <= set(reached)


def test_every_control_has_a_name(visit: Callable[..., Visitor]) -> None:
    visitor = visit().open("/?compare")
    visitor.send("Show me")
    visitor.read()
    for opened in ("", "Alt+s", "?"):
        if opened:
            visitor.page.evaluate("document.activeElement.blur()")
            visitor.page.keyboard.press(opened)
            visitor.page.locator("dialog[open]").wait_for()
        nodes = visitor.page.context.new_cdp_session(visitor.page).send("Accessibility.getFullAXTree")[
            "nodes"
        ]
        controls = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
            and any(each["name"] == "focusable" and each["value"]["value"] for each in node["properties"])
        ]
        assert len(controls) > (0 if opened == "?" else 8)
        assert [role for role, name in controls if not name.strip()] == []
        visitor.page.keyboard.press("Escape")
    headings = visitor.page.get_by_role("heading").all_inner_texts()
    assert headings[:2] == ["tiny", "Title"]
    assert visitor.page.get_by_role("log", name="Conversation").get_attribute("aria-live") == "off"


# Texts that do not stand out from what is behind them: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio
CONTRASTS = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const luminance = (color) => {
        const [r, g, b] = channels(color).slice(0, 3).map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if ((channels(color)[3] ?? 1) === 1) return color;
        }
    };
    const low = [];
    for (const element of document.querySelectorAll("body *")) {
        const text = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
        const seen = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
        if (!text.length || !seen || element.closest(".hidden, .skip")) continue;
        const colors = [getComputedStyle(element).color, background(element)];
        const pair = colors.map(luminance).sort((a, b) => b - a);
        const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
        if (contrast < 4.5) low.push([text[0].data, contrast]);
    }
    return low;
}"""


def test_light_and_dark_follow_the_system_and_the_switch_and_can_be_read(
    visit: Callable[..., Visitor],
) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    colours = {}
    for scheme in ("light", "dark"):
        visitor = visit(color_scheme=scheme).open()
        colours[scheme] = visitor.page.evaluate(background)
        visitor.ask("Show me")
        visitor.ask("What is 12 + 30?")
        visitor.page.route("**/v1/chat/completions", lambda route: route.abort())
        visitor.ask("What is your name?")
        visitor.keep(scheme)
        assert visitor.page.evaluate(CONTRASTS) == []
    assert colours["light"] != colours["dark"]
    # Against the system's, and still so after a reload.
    visitor.page.get_by_role("radio", name="Light").check(force=True)
    assert visitor.page.evaluate(background) == colours["light"]
    visitor.page.reload()
    assert visitor.page.evaluate(background) == colours["light"]
    assert visitor.page.get_by_role("radio", name="Light").is_checked()
    visitor.page.get_by_role("radio", name="System").check(force=True)
    assert visitor.page.evaluate(background) == colours["dark"]


@pytest.mark.parametrize("path", ["/", "/?compare"])
def test_a_phone_shows_everything_without_scrolling_sideways(
    visit: Callable[..., Visitor], path: str
) -> None:
    visitor = visit(width=375, height=720, has_touch=True, is_mobile=True).open(path)
    page = visitor.page

    def fits() -> None:
        assert page.evaluate(
            "[document.documentElement.scrollWidth, document.querySelector('#scroll').scrollWidth]"
        ) <= [
            375,
            375,
        ]

    fits()
    for question in ("Show me", "x" * 300, "What is 12 + 30?"):
        visitor.send(question)
        visitor.read()
        fits()
    visitor.keep("phone" if path == "/" else "phone-compare")
    chats = page.get_by_role("link", name="Show me")
    assert not chats.is_visible()
    page.get_by_role("button", name="Show the list of chats").tap()
    wait_for(
        lambda: page.locator("#sidebar").evaluate("element => element.getBoundingClientRect().left") == 0
    )
    fits()
    visitor.keep("phone-chats")
    page.get_by_role("complementary", name="Chats").get_by_role("button", name="New chat").tap()
    chats.wait_for(state="hidden")
    assert visitor.answers.count() == 0
    visitor.page.get_by_role("button", name=re.compile("^Settings of model")).first.tap()
    page.get_by_role("dialog").wait_for()
    fits()
    box = page.get_by_role("dialog").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375


# -- in earnest ------------------------------------------------------------------------------------


def test_a_trained_model_is_talked_to(visit: Callable[..., Visitor], chat_store: ObjectStore) -> None:
    engines = {
        "quick": load_engine(chat_store, "quick"),
        "quick:base": load_engine(chat_store, "quick", "base"),
    }
    quick, base = [Scheduler(engine.model, engine.tokenizer) for engine in engines.values()]
    models = [ServedModel("quick", quick, True), ServedModel("quick:base", base, False)]
    with quick, base, running(models, Serving(defaults=Defaults(temperature=0))) as (url, _):
        visitor = visit(url).open()
        assert visitor.ask("What is your name?") == "I am NanoChat 😀."
        visitor.button("New chat").click()
        visitor.ask("What is 17+25?")
        call = visitor.page.get_by_role("group", name="Calculator")
        assert call.inner_text().split() == ["Calculator", "17+25", "=", "42"]
        assert visitor.answers.locator(".body > p").inner_text() == "The answer is 42."
        visitor.button("New chat").click()
        visitor.page.get_by_label("Model", exact=True).select_option("quick:base")
        assert visitor.ask("Once upon") == "a time there was a model."
