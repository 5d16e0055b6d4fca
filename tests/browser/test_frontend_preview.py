"""The preview of a sampling in a real browser: the predicted clip plays while the node runs, and rests afterwards."""

from __future__ import annotations

import re
from typing import Any

import pytest
from devlib import workflows
from devlib.graphs import forget
from support.pages import FIT, Open, shrunk
from support.workflow_files import read

pytestmark = pytest.mark.slow

WATCH = """sampler => {
  window.seen = { sent: [], shown: [], texts: [], sources: [] }
  app.api.addEventListener('ovi-native.preview', event => window.seen.sent.push(event.detail))
  app.api.addEventListener('b_preview_with_metadata', async event => {
    const { blob, displayNodeId } = event.detail
    const hash = await crypto.subtle?.digest('SHA-1', await blob.arrayBuffer())
    window.seen.shown.push([String(displayNodeId), blob.size, performance.now(),
                            [...new Uint8Array(hash ?? [])].join()])
  })
  app.api.addEventListener('progress_text', event => window.seen.texts.push(event.detail.text))
  setInterval(() => {
    const drawn = document.querySelector(`[data-node-id='${sampler}'] img`) ?? app.graph.getNodeById(sampler)?.imgs?.[0]
    if (drawn?.naturalWidth && !window.seen.sources.includes(drawn.src)) window.seen.sources.push(drawn.src)
  }, 20)
}"""
STEPS = 8  # of the trained tiny model, which takes longer for each than the page for its pictures
DONE = "[...document.querySelectorAll('video')].some(video => video.readyState === 4)"


def sampler_of(workflow: dict[str, Any]) -> int:
    return next(node["id"] for node in workflow["nodes"] if node["type"] in ("OviSampler", "SamplerCustomAdvanced"))


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes 2.0"])
def test_the_predicted_clip_plays_while_the_sampler_runs(modern: bool, visit: Open, comfy_client):
    workflow = read("ovi_text_to_av_tiny")
    sampler = sampler_of(workflow)
    opened = visit(width=2200, height=1200, **{"Comfy.VueNodes.Enabled": modern})
    page = opened.page
    opened.load(workflow)
    page.evaluate(FIT)
    opened.set("OviSampler", steps=STEPS, seed=900 + modern)
    page.evaluate(WATCH, sampler)
    forget(comfy_client)
    opened.run()
    opened.until(DONE, seconds=150)
    seen = page.evaluate("window.seen")
    assert len(seen["sent"]) == STEPS
    first = seen["sent"][0]
    assert first["node"] == str(sampler) and first["count"] == 16 and first["seconds"] == pytest.approx(31 / 6)
    assert {node for node, *_ in seen["shown"]} == {str(sampler)}
    assert len({content for *_, content in seen["shown"]}) > len({sent["sheet"] for sent in seen["sent"]})
    assert len(seen["sources"]) > 1, "the node draws what it is given"
    step = re.compile(rf"step \d+ of {STEPS}, \d+\.\d s each, \d+:\d\d left")
    told = [text for text in seen["texts"] if step.fullmatch(text)]
    assert len(told) == STEPS
    assert re.search(rf"{STEPS} steps in \d+:\d\d, seed {900 + modern}\b", page.locator("body").inner_text())
    before = len(seen["shown"])
    page.wait_for_timeout(1000)
    assert page.evaluate("window.seen.shown.length") == before, "it goes on after the node has finished"
    assert opened.complaints == []


def test_no_preview_is_sent_where_previews_are_off(visit: Open, object_info):
    workflow = shrunk("ovi_text_to_av_tiny", object_info, OviSampler={"steps": 2, "seed": 950})
    opened = visit(**{"Comfy.Execution.PreviewMethod": "none"})
    opened.load(workflow)
    opened.page.evaluate(WATCH, sampler_of(workflow))
    opened.run()
    opened.until(DONE, seconds=150)
    seen = opened.page.evaluate("window.seen")
    assert seen["sent"] == [] and any(text.startswith("step 2 of 2") for text in seen["texts"])


def test_stock_samplers_show_the_same(visit: Open, object_info, comfy_client):
    forget(comfy_client)
    workflow = shrunk("ovi_text_to_av_custom_sampler", object_info)
    opened = visit()
    opened.load(workflow)
    opened.page.evaluate(WATCH, sampler_of(workflow))
    opened.run()
    opened.until(DONE, seconds=150)
    seen = opened.page.evaluate("window.seen")
    assert {sent["node"] for sent in seen["sent"]} == {str(sampler_of(workflow))}
    assert workflows.to_api(read("ovi_text_to_av_custom_sampler"), object_info)
