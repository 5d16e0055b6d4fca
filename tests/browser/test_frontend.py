"""The pack in a real browser: ComfyUI's own front end, driven the way a user does."""

from __future__ import annotations

import base64
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from devlib import workflows
from devlib.common import PACK_NAME, ROOT
from devlib.graphs import forget
from PIL import Image
from support.pages import FIT, SECOND, Open, shrunk
from support.workflow_files import FOLDER, NAMES, REAL, SMALL, apart, models_of, read

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
from playwright.sync_api import TimeoutError

pytestmark = pytest.mark.slow


def plain(markdown: str) -> str:
    """The words of a Markdown text, without its marks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"[*|#-]", " ", text.replace("`", "")).split())


# --- what the pack brings ---------------------------------------------------------------------------------------------


def test_every_node_appears_without_complaints(visit: Open, ours: list[str], object_info):
    opened = visit()
    page = opened.page
    assert len(ours) >= 13
    for name in ours:
        title = page.evaluate(
            "name => { const node = LiteGraph.createNode(name); app.graph.add(node); return node.title }", name)
        assert title == object_info[name]["display_name"]
    page.wait_for_timeout(SECOND)
    assert opened.complaints == []


def test_templates_are_offered_under_the_packs_name(visit: Open):
    opened = visit()
    page = opened.page
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.locator("[aria-labelledby=global-workflow-template-selector]")
    dialog.get_by_text(PACK_NAME, exact=True).click()
    dialog.get_by_test_id(f"template-workflow-{NAMES[0]}").wait_for()
    cards = dialog.locator("[data-testid^=template-workflow-]")
    names = cards.evaluate_all("cards => cards.map(card => card.dataset.testid)")
    assert sorted(names) == sorted(f"template-workflow-{name}" for name in NAMES)
    for name in NAMES:
        with Image.open(FOLDER / f"{name}.jpg") as image:
            opened.until("""([name, width]) => document.querySelector(`[data-testid="template-workflow-${name}"] img`)
              ?.naturalWidth === width""", [name, image.width], 20)
    dialog.get_by_test_id("template-workflow-ovi_text_to_av_tiny").click()
    opened.until("count => app.graph._nodes.length === count", len(read("ovi_text_to_av_tiny")["nodes"]))
    assert page.evaluate("app.graph._groups.length") == 5
    assert opened.complaints == []


def test_workflows_open_without_missing_nodes_and_convert_as_expected(visit: Open, object_info):
    opened = visit()
    for name in NAMES:
        opened.load(read(name))
        unknown = opened.page.evaluate(
            "app.graph._nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)")
        assert unknown == [], name
        converted = opened.page.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
        expected = workflows.to_api(read(name), object_info)
        assert {number: (node["class_type"], node["inputs"]) for number, node in converted.items()} == {
            number: (node["class_type"], node["inputs"]) for number, node in expected.items()}, name
        groups = opened.page.evaluate("app.graph._groups.map(group => group.title)")
        assert groups == [group["title"] for group in read(name)["groups"]]
        if name in SMALL:
            opened.page.wait_for_timeout(SECOND)
            assert opened.page.get_by_test_id("error-overlay").count() == 0, "the tiny files are there"


@pytest.mark.parametrize("name", REAL)
def test_missing_models_are_offered_with_their_addresses(name: str, visit: Open, object_info):
    models = models_of(read(name))
    offered = {file for files in workflows.offered_files(object_info).values() for file in files}
    if offered & {model["name"] for model in models}:
        pytest.skip("this machine has real weights, so nothing is missing")
    opened = visit()
    page = opened.page
    opened.load(read(name))
    page.get_by_test_id("error-overlay").get_by_role("button", name="View details").click()
    panel = page.get_by_test_id("error-group-missing-model")
    panel.wait_for()
    assert panel.get_by_test_id("missing-model-download").count() == len(models)
    text = panel.inner_text()
    for model in models:
        assert re.search(rf"{re.escape(model['name'])}\s+{model['directory']}\b", text), model["name"]
    assert {url for method, url in opened.asked if method == "HEAD"} == {model["url"] for model in models}


def test_help_opens_for_every_node(visit: Open, ours: list[str]):
    page = visit().page
    for name in ours:
        document = (ROOT / "web" / "docs" / f"{name}.md").read_text("utf-8")
        title, paragraph = re.match(r"# (.+)\n\n((?:.+\n)+)", document).groups()
        page.evaluate("""name => {
          app.graph.clear()
          const node = LiteGraph.createNode(name)
          app.graph.add(node)
          app.canvas.selectNode(node)
          app.canvas.centerOnNode(node)
        }""", name)
        page.locator(".selection-toolbox [data-testid=info-button]").click()
        shown = page.locator(".node-help-content")
        shown.get_by_role("heading", name=title, exact=True).wait_for()
        assert plain(paragraph) in plain(shown.inner_text()), name
        page.keyboard.press("Escape")
        page.evaluate("app.canvas.deselectAll()")


def test_a_node_is_found_by_search(visit: Open):
    opened = visit()
    page = opened.page
    box = page.get_by_role("search").get_by_role("combobox")
    for _ in range(5):  # a busy machine may see two single clicks
        page.mouse.dblclick(800, 450)
        with contextlib.suppress(TimeoutError):
            box.wait_for(timeout=5 * SECOND)
            break
    box.fill("Ovi Prompt")
    first = page.get_by_test_id("result-item").first
    first.wait_for()
    assert "Ovi Prompt" in first.inner_text() and "Ovi / conditioning" in first.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_timeout(SECOND // 2)
    page.mouse.click(700, 300)
    opened.until("app.graph._nodes.length === 1")
    assert page.evaluate("app.graph._nodes[0].type") == "OviPrompt"


# --- running ----------------------------------------------------------------------------------------------------------


WATCH = """() => {
  window.seen = { previews: 0, progress: [] }
  app.api.addEventListener('b_preview', () => { window.seen.previews += 1 })
  app.api.addEventListener('progress', event => window.seen.progress.push(event.detail.value))
}"""


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes 2.0"])
def test_a_run_shows_progress_preview_reports_and_the_clip(modern: bool, visit: Open, object_info, comfy_client):
    workflow = shrunk("ovi_text_to_av_tiny", object_info, OviSampler={"steps": 3, "seed": 500 + modern},
                      OviPrompt={"scene": f'A man says "hello number {modern:d}". He waves.'})
    opened = visit(width=2200, height=1200, **{"Comfy.VueNodes.Enabled": modern})
    page = opened.page
    opened.load(workflow)
    page.evaluate(FIT)
    page.evaluate(WATCH)
    forget(comfy_client)  # a node that comes out of the cache has nothing to report
    opened.run()
    opened.until("[...document.querySelectorAll('video')].some(video => video.readyState === 4)", seconds=150)
    seen = page.evaluate("window.seen")
    assert {1, 2, 3} <= set(seen["progress"]) and seen["previews"] >= 1
    drawn = {True: "document.querySelector(`[data-node-id='${id}'] img`)", False: "app.graph.getNodeById(id).imgs?.[0]"}
    sampler = next(node["id"] for node in workflow["nodes"] if node["type"] == "OviSampler")
    opened.until(f"id => {drawn[modern]}?.naturalWidth > 0", sampler)
    body = page.locator("body").inner_text()
    for report in (r"128x96, 9 frames", r"⚠ 128x96 is 1% of the area", r"⚠ .*<S>", r"ovi_tiny_random\S*: Ovi"):
        assert re.search(report, body), f"{report} is not on a node"
    assert opened.complaints == []


def test_dropping_the_clip_restores_the_graph(visit: Open, object_info, comfy_client):
    workflow = shrunk("ovi_text_to_av_tiny", object_info, OviSampler={"steps": 1, "seed": 77})
    run = comfy_client.run(workflows.to_api(workflow, object_info), workflow)
    clip = comfy_client.view(next(output for output in run.outputs if output.filename.endswith(".mp4")))
    opened = visit()
    opened.page.evaluate("""content => {
      const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0))
      const transfer = new DataTransfer()
      transfer.items.add(new File([bytes], 'clip.mp4', { type: 'video/mp4' }))
      for (const type of ['dragenter', 'dragover', 'drop']) document.dispatchEvent(
        new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }))
    }""", base64.b64encode(clip).decode())
    opened.until("count => app.graph._nodes.length === count", len(workflow["nodes"]))
    restored = json.loads(opened.page.evaluate("JSON.stringify(app.graph.serialize())"))
    assert [group["title"] for group in restored["groups"]] == [group["title"] for group in workflow["groups"]]

    def values(graph: dict[str, Any]) -> dict[int, Any]:
        return {node["id"]: node.get("widgets_values") for node in graph["nodes"]}

    assert values(restored) == values(workflow)  # the notes' text is among them


@pytest.mark.parametrize(("mistake", "sentence"), [
    ("skip layer", "Skip layer 99 does not exist"),
    ("audio VAE as video VAE", r"The video VAE has \d+ latent channels, but Ovi needs the Wan2.2 VAE"),
])
def test_a_mistake_is_answered_with_our_sentence(mistake: str, sentence: str, visit: Open, object_info):
    workflow = shrunk("ovi_text_to_av_tiny", object_info)
    opened = visit()
    opened.load(workflow)
    if mistake == "skip layer":
        opened.set("OviSampler", skip_layer=99)
    else:
        opened.page.evaluate("""() => {
          const node = type => app.graph._nodes.find(node => node.type === type)
          const target = node('OviDecode')
          node('OviVAELoader').connect(1, target, target.inputs.findIndex(input => input.name === 'video_vae'))
        }""")
    opened.run()
    opened.page.get_by_test_id("error-overlay").wait_for(timeout=150 * SECOND)
    opened.page.get_by_test_id("error-overlay-see-errors").click()
    opened.page.get_by_text(re.compile(sentence)).first.wait_for()


# --- other ways to look at it -----------------------------------------------------------------------------------------


BOXES = """() => [...document.querySelectorAll('[data-node-id]')].map(element => {
  const { left, top, right, bottom } = element.getBoundingClientRect()
  return [element.dataset.nodeId, [left, top, right, bottom], element.innerText]
})"""


def test_modern_nodes_draw_everything_without_overlap(visit: Open, object_info):
    opened = visit(width=2400, height=1400, **{"Comfy.VueNodes.Enabled": True})
    for name in NAMES:
        # with a missing file a node grows a footer, which is not part of the layout
        workflow = shrunk(name, object_info) if name in REAL else read(name)
        opened.load(workflow)
        opened.page.evaluate(FIT)
        opened.until("count => document.querySelectorAll('[data-node-id]').length === count", len(workflow["nodes"]))
        opened.page.wait_for_timeout(SECOND)
        titles = {str(node["id"]): node.get("title") or object_info[node["type"]]["display_name"] or node["type"]
                  for node in workflow["nodes"]}
        boxes = opened.page.evaluate(BOXES)
        for i, (number, box, text) in enumerate(boxes):
            assert titles[number] in text, name
            for other, box2, _ in boxes[:i]:
                inner = [box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1]  # borders may touch
                assert apart(inner, box2), f"{name}: {titles[number]} and {titles[other]} overlap"
    assert opened.complaints == []


def test_a_japanese_front_end_shows_our_nodes(visit: Open, ours: list[str], object_info):
    opened = visit(**{"Comfy.Locale": "ja"})
    assert opened.page.get_by_role("button", name="実行").count() >= 1, "the front end did not change its language"
    opened.load(read("ovi_image_to_av_tiny"))
    titles = opened.page.evaluate("Object.fromEntries(app.graph._nodes.map(node => [node.type, node.title]))")
    for name in set(ours) & set(titles):
        assert titles[name] == object_info[name]["display_name"]
    assert opened.complaints == []


def test_thumbnails_and_workflows_are_what_the_server_sends(comfy_client):
    listed = comfy_client.request("/api/workflow_templates")
    assert sorted(listed[PACK_NAME]) == sorted(NAMES)
    for name in NAMES:
        for ending in ("json", "jpg"):
            sent = comfy_client.request(f"/api/workflow_templates/{PACK_NAME}/{name}.{ending}", raw=True)
            assert sent == Path(FOLDER / f"{name}.{ending}").read_bytes()
