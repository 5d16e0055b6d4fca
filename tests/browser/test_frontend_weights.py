"""The button of 'Ovi Weights' in a real browser, with a local Hub behind the server."""

import json
import shutil
import time
import urllib.request

import pytest
from devlib import comfyui
from devlib.server import ComfyServer
from ovi_native.ovi_model.ovi import catalogue
from support.hub_server import HubServer, publish, put_pinned

pytestmark = pytest.mark.slow

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

SIZE = 1_280_000
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.47.12", "Comfy.Workflow.Persist": False}
READY = ("window.app?.extensionManager && app.graph && app.canvas && !document.querySelector('.p-blockui-mask')")
RESTRICTED = ("For non-commercial use only (CC-BY-NC-4.0): MMAudio 16 kHz VAE, BigVGAN vocoder. Every clip passes "
              "through them.")
NEEDED = catalogue.needed_files("960x960_5s", "bf16")
FREE = [file for file in NEEDED if file.sha256 is None]  # those that a stand-in can stand in for


@pytest.fixture(scope="module")
def server_and_hub(tmp_path_factory):
    if comfyui.find() is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH or run tools/dev.py setup")
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    with HubServer().running() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        base = tmp_path_factory.mktemp("weights")
        with ComfyServer(base, models=base / "models") as server:
            settings = urllib.request.Request(f"{server.url}/api/settings", json.dumps(SETTINGS).encode(),
                                              {"Content-Type": "application/json"})
            urllib.request.urlopen(settings, timeout=30).close()
            yield server, hub


@pytest.fixture(scope="module")
def browser(server_and_hub):  # noqa: ARG001
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def hub(server_and_hub):
    """The Hub with nothing on it, and ComfyUI's folders without a file."""
    server, hub = server_and_hub
    for path in (server.base / "models").rglob("*"):
        if path.is_file():
            path.unlink()
    for kept in (hub.files, hub.faults, hub.requests):
        kept.clear()
    return hub


@pytest.fixture
def page(server_and_hub, browser, hub):  # noqa: ARG001
    """A page with one 'Ovi Weights' on the canvas; errors of our script fail the test."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server_and_hub[0].url, wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=60_000)
    page.evaluate("app.graph.clear()")
    add_node(page)
    expect(rows(page)).to_have_count(5, timeout=15_000)
    yield page
    page.close()
    assert not [error for error in errors if "ovi" in error.lower()]


def add_node(page):
    page.evaluate("""() => {
        const node = LiteGraph.createNode('OviWeights');
        node.pos = [150, 150];
        app.graph.add(node);
        app.canvas.ds.scale = 1;
        app.canvas.ds.offset = [0, 0];
        app.canvas.setDirty(true, true);
    }""")


def part(page, name):
    return page.locator(f"[data-ovi={name}]")


def rows(page):
    return part(page, "list").locator("li")


def question(page):
    """The dialog that asks before a download."""
    return page.get_by_role("dialog").filter(has_text="Hugging Face Hub")


def test_the_list_is_there_and_nothing_was_fetched_for_it(page, hub):
    expect(rows(page).first).to_have_text("✘ Ovi model: model_960x960.safetensors (23.3 GB, Apache-2.0)")
    expect(rows(page).last).to_contain_text("netG_bf16.safetensors (213 MB, CC-BY-NC-4.0)")
    expect(part(page, "note")).to_have_text(RESTRICTED)
    expect(part(page, "status")).to_have_text("5 of 5 files are missing (32.0 GB to download).")
    expect(part(page, "download")).to_be_enabled()
    expect(part(page, "cancel")).to_be_hidden()
    page.evaluate("""() => {
        const widget = app.graph._nodes[0].widgets.find((w) => w.name === 'variant');
        widget.value = '960x960_10s';
        widget.callback(widget.value);
    }""")
    expect(rows(page).first).to_have_text("✘ Ovi model: model_960x960_10s.safetensors (23.3 GB, Apache-2.0)")
    assert hub.requests == []


def test_no_without_a_yes(page, hub, server_and_hub):
    publish(hub, NEEDED, SIZE)
    part(page, "download").click()
    models = server_and_hub[0].base / "models"
    asked = question(page)
    expect(asked).to_contain_text("Download 5 files, 32.0 GB in total")
    expect(asked).to_contain_text("chetwinlow1/Ovi: model_960x960.safetensors, 23.3 GB, licence Apache-2.0, into "
                                  f"{models}/diffusion_models")
    expect(asked).to_contain_text(f"{models}/vae (")
    expect(asked).to_contain_text("Checked against the Hub's own hash only, since no other is known to this pack: "
                                  "model_960x960.safetensors, mmaudio_vae_16k_bf16.safetensors,")
    expect(asked).to_contain_text("netG_bf16.safetensors, 213 MB, licence CC-BY-NC-4.0, into ")
    expect(asked).to_contain_text(RESTRICTED)
    page.keyboard.press("Escape")
    expect(asked).to_have_count(0)
    expect(part(page, "download")).to_be_enabled()
    assert hub.requests == []


def test_download_with_progress(page, hub, server_and_hub):
    contents = publish(hub, FREE, SIZE, pause_s=0.03) | put_pinned(server_and_hub[0].base / "models", NEEDED, SIZE)
    part(page, "download").click()
    question(page).get_by_role("button", name="Confirm").click()
    expect(part(page, "progress")).to_be_visible()
    expect(part(page, "download")).to_be_disabled()
    expect(part(page, "status")).to_contain_text("of 1.3 MB (all:")
    expect(part(page, "status")).to_have_text("All files are here.", timeout=30_000)
    expect(part(page, "list").locator("[data-ovi=present]")).to_have_count(5)
    expect(part(page, "progress")).to_be_hidden()
    expect(part(page, "download")).to_be_disabled()
    models = server_and_hub[0].base / "models"
    assert {path.name: path.read_bytes() for path in models.rglob("*") if path.is_file()} == contents
    # The loaders' lists know the new files without a reload, as soon as the page has asked for them.
    page.wait_for_function("""() => {
        const node = LiteGraph.createNode('OviAudioVAELoader');
        const names = node.widgets.find((w) => w.name === 'vae_name').options.values;
        return names.includes('mmaudio_vae_16k_bf16.safetensors');
    }""", timeout=15_000)


def test_cancel_reload_and_go_on(page, hub, server_and_hub):
    publish(hub, FREE, 4 * SIZE, pause_s=0.2)
    put_pinned(server_and_hub[0].base / "models", NEEDED, SIZE)
    part(page, "download").click()
    question(page).get_by_role("button", name="Confirm").click()
    expect(part(page, "status")).to_contain_text("Downloading model_960x960.safetensors", timeout=15_000)
    page.reload(wait_until="domcontentloaded")  # a page that comes later finds the download under way
    page.wait_for_function(READY, timeout=60_000)
    page.evaluate("app.graph.clear()")
    add_node(page)
    expect(part(page, "cancel")).to_be_visible()
    part(page, "cancel").click()
    expect(part(page, "status")).to_contain_text("Stopped. What has arrived is kept")
    expect(rows(page).filter(has_text="of it here, ")).to_have_count(1)
    for fault in hub.faults.values():
        fault.pause_s = 0.0
    hub.requests.clear()
    part(page, "download").click()
    question(page).get_by_role("button", name="Confirm").click()
    expect(part(page, "status")).to_have_text("All files are here.", timeout=30_000)
    assert hub.bodies()[0].range != "bytes=0-"


def test_the_reason_stands_on_the_node(page, hub):
    publish(hub, NEEDED, SIZE, status=403, error_code="GatedRepo")
    part(page, "download").click()
    question(page).get_by_role("button", name="Confirm").click()
    expect(part(page, "status")).to_contain_text("⚠ chetwinlow1/Ovi is open only to those who accepted its terms")
    expect(part(page, "download")).to_be_enabled()
    assert hub.bodies() == []


def test_saved_workflow_holds_the_choices_and_nothing_else(page):
    saved = page.evaluate("app.graph.serialize().nodes[0].widgets_values")
    assert saved == ["960x960_5s", "bf16"]
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert [node["inputs"] for node in prompt.values()] == [{"variant": "960x960_5s", "precision": "bf16"}]
    page.evaluate("""async () => {
        const saved = app.graph.serialize();
        saved.nodes[0].widgets_values[0] = '720x720_5s';
        await app.loadGraphData(saved);
    }""")
    expect(rows(page).first).to_have_text("✘ Ovi model: model.safetensors (23.3 GB, Apache-2.0)")


def test_removed_node_leaves_nothing_behind(page):
    page.evaluate("app.graph.remove(app.graph._nodes[0])")
    expect(part(page, "weights")).to_have_count(0)
    time.sleep(0.1)


def test_it_is_drawn_in_nodes_2_too(page, hub):
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.reload(wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=60_000)
        page.evaluate("app.graph.clear()")
        add_node(page)
        expect(page.locator("[data-node-id] [data-ovi=list] li")).to_have_count(5)
        part(page, "download").click()
        expect(question(page)).to_contain_text("Download 5 files")
        page.keyboard.press("Escape")
        assert hub.requests == []
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
