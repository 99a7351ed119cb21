"""The UI in a real browser: the graph, a stage's page with its loss curve, the report.

Set ``NANOCHAT_SCREENSHOTS`` to a folder to keep what was seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from standins.checkout import make_checkout, serve

BIN = Path(sys.executable).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")


@pytest.fixture(scope="module")
def server(tmp_path_factory, module_environment) -> Iterator[str]:
    """`dg dev` over the history of a tiny model."""
    root = tmp_path_factory.mktemp("project").resolve()
    environment = {**os.environ, **make_checkout(root), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [str(BIN / "nanochat"), "quickstart", "--model", "tiny"],
        cwd=root,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=280,
    )
    with serve(root, environment, "dg", "dev") as url:
        yield url


@pytest.fixture(scope="module")
def page(server: str) -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
            ],
        )
        page = browser.new_page(viewport={"width": 1500, "height": 1100}, base_url=server)
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def keep(page: object, name: str) -> None:
    folder = os.environ.get("NANOCHAT_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))  # type: ignore[attr-defined]


def test_the_graph_shows_every_group_and_its_assets(page) -> None:
    page.goto("/asset-groups")
    for group in ("ingestion", "tokenizer", "base", "midtraining", "sft", "evaluation", "serving"):
        page.get_by_text(group, exact=True).first.wait_for()
    page.keyboard.press("Alt+e")
    page.get_by_text("tokenizer_training", exact=True).first.wait_for()
    page.get_by_text("model_run_config", exact=True).first.wait_for()
    page.wait_for_timeout(1500)
    keep(page, "graph")


def test_a_stages_page_shows_its_loss_curve(page) -> None:
    page.goto("/assets/base_model_checkpoint?view=partitions&partition=tiny")
    page.get_by_text("val_bpb").first.wait_for()
    keep(page, "stage")
    row = page.locator("tr", has=page.get_by_text("loss_curve", exact=True))
    row.scroll_into_view_if_needed()
    row.get_by_text("Show Markdown").click()
    picture = page.locator("img[alt='loss curve']").first
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") == 700
    page.wait_for_timeout(500)
    keep(page, "loss_curve")


def test_the_live_metrics_of_a_stage_have_plots(page) -> None:
    page.goto("/assets/live_metrics/tiny/base?view=overview")
    page.get_by_text("Plots", exact=True).click()
    page.get_by_text("tokens_per_s").first.wait_for()
    page.wait_for_timeout(1500)
    keep(page, "live_metrics")


def test_the_report_is_shown_with_its_pictures(page) -> None:
    page.goto("/assets/model_report?view=partitions&partition=tiny")
    row = page.locator("tr", has=page.get_by_text("report", exact=True))
    row.get_by_text("Show Markdown").first.click()
    page.get_by_role("heading", name="Lineage").wait_for()
    page.wait_for_timeout(500)
    keep(page, "report")
