"""The front end in a real browser, driven the way a user does, for the tests below tests/browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from devlib import workflows
from devlib.common import PACK_NAME

from .workflow_files import read

if TYPE_CHECKING:
    from playwright.sync_api import ConsoleMessage, Page, Route

ARGUMENTS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --disable-dev-shm-usage").split()
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.47.12", "Comfy.Workflow.Persist": False,
    "Comfy.Validation.Workflows": True, "Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en",
    "Comfy.RightSidePanel.IsOpen": False, "Comfy.Minimap.Visible": False, "Comfy.Execution.PreviewMethod": "default",
}
READY = "window.app?.extensionManager && app.canvas && app.graph && !document.querySelector('.p-blockui-mask')"
LOAD = "async workflow => { await app.loadGraphData(workflow, true, true, 'test') }"
FIT = """() => {
  const boxes = [...app.graph._nodes, ...app.graph._groups].map(item => [item.pos[0], item.pos[1] - 30,
    item.pos[0] + item.size[0], item.pos[1] + item.size[1]])
  const [left, top] = [0, 1].map(i => Math.min(...boxes.map(box => box[i])))
  const [right, bottom] = [2, 3].map(i => Math.max(...boxes.map(box => box[i])))
  const { width, height } = app.canvas.canvas.getBoundingClientRect()
  const scale = Math.min((width - 100) / (right - left), (height - 120) / (bottom - top))
  app.canvas.ds.scale = scale
  app.canvas.ds.offset[0] = 80 / scale - left
  app.canvas.ds.offset[1] = 90 / scale - top
  app.canvas.setDirty(true, true)
}"""
SECOND = 1000  # milliseconds


class Visit:
    """One open page of the front end, what it complained about, and what it asked the outside world for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[tuple[str, str]] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.context.route(lambda address: not address.startswith((url, "data:", "blob:")), self._answer)

    def _note(self, message: ConsoleMessage) -> None:
        """Keep errors, except the front end's own: files it asks for on the off chance, and its talk while starting."""
        address = message.location.get("url", "")
        its_own = message.text.startswith(("Failed to load resource", "ComfyApp graph accessed before initialization"))
        if message.type == "error" and (not its_own or PACK_NAME in address):
            self.complaints.append(f"{message.text} ({address})")

    def _answer(self, route: Route) -> None:
        """Stand in for the internet: note who was asked for what, and give nothing."""
        self.asked.append((route.request.method, route.request.url))
        route.fulfill(status=200, headers={"access-control-allow-origin": "*", "content-length": "0"}, body="")

    def load(self, workflow: dict[str, Any]) -> None:
        """Put a workflow on the canvas."""
        self.page.evaluate(LOAD, workflow)
        self.page.wait_for_function("count => app.graph._nodes.length === count", arg=len(workflow["nodes"]))

    def run(self) -> None:
        """Press Ctrl+Enter."""
        self.page.keyboard.press("Control+Enter")

    def until(self, expression: str, argument: Any = None, seconds: float = 90) -> Any:
        """Wait until a JavaScript expression is true, and return its value."""
        return self.page.wait_for_function(expression, arg=argument, timeout=seconds * SECOND).json_value()

    def set(self, node_type: str, **widgets: Any) -> None:
        """Set widgets of the only node of a type."""
        self.page.evaluate("""([type, values]) => {
          const node = app.graph._nodes.find(node => node.type === type)
          for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value
        }""", [node_type, widgets])


Open = Callable[..., Visit]

def shrunk(name: str, object_info: dict[str, Any], **inputs: dict[str, Any]) -> dict[str, Any]:
    """A shipped workflow on tiny models with small sizes, still in UI format; other inputs by node type."""
    workflow = read(name)
    api = workflows.shrink(workflows.to_api(workflow, object_info), object_info)
    for node in api.values():
        node["inputs"] |= inputs.get(node["class_type"], {})
    return workflows.show_in_ui(workflow, api, object_info)
