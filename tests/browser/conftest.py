"""Chromium and the pages of the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from devlib.checks import find_browser
from devlib.client import ComfyClient
from devlib.common import PACK_NAME
from support.pages import ARGUMENTS, READY, SECOND, SETTINGS, Open, Visit


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, started once."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=str(found), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, comfy_server, comfy_client: ComfyClient) -> Iterator[Open]:
    """Opens the front end with ComfyUI settings of choice; every page is closed afterwards."""
    contexts = []

    def open_page(width: int = 1600, height: int = 900, **settings: Any) -> Visit:
        comfy_client.request("/api/settings", {**SETTINGS, **settings})
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60 * SECOND)
        opened = Visit(page, comfy_server.url)
        page.goto(comfy_server.url, wait_until="domcontentloaded")
        opened.until(READY)
        page.evaluate("app.graph.clear()")
        return opened

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def ours(object_info) -> list[str]:
    """Ids of the pack's nodes."""
    return sorted(name for name, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}")
