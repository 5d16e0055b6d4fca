"""Text shown on a node after it ran: what was decided and what looks wrong, where the user is looking."""

import html
from collections.abc import Callable

from comfy_api.latest import io, ui

from ..ovi_model.files.names import printable


def report(node: type[io.ComfyNode], lines: list[str], warnings: list[str]) -> ui.PreviewText:
    """Show each warning, then the lines, on the node being executed; the return value is for NodeOutput(ui=...).

    The front end draws the `ui` text only on its own text nodes, so the text is sent as the node's progress text too
    (as core's 'Get Image Size' does). The schema must list `io.Hidden.unique_id` for that.
    """
    text = _sendable("\n".join([*(f"⚠ {warning}" for warning in warnings), *lines]))
    if node.hidden and node.hidden.unique_id:
        send_text(text, node.hidden.unique_id)
    return ui.PreviewText(text)


def later(node: type[io.ComfyNode]) -> Callable[[str], None]:
    """A function that shows a line on the node being executed when it has long finished: at the end of a sampling."""
    node_id = node.hidden.unique_id if node.hidden else None

    def show(text: str) -> None:
        if node_id:
            send_text(_sendable(text), node_id)

    return show


def _sendable(text: str) -> str:
    """The text with everything but its line breaks made printable: names of files may hold what is no text."""
    return "\n".join(map(printable, text.split("\n")))


def send_text(text: str, node_id: str) -> None:
    """Show a text on a node in the tab that asked for the run, and in no other: node ids repeat between workflows."""
    from server import PromptServer  # only inside a running ComfyUI, where it is loaded already

    server = PromptServer.instance
    if server.client_id is not None:
        escaped = html.escape(text, quote=False)  # the front end draws it as HTML, where <S> would vanish
        server.send_progress_text(escaped, node_id, server.client_id)


def send_event(name: str, data: dict) -> None:
    """Tell the page of the tab that asked for the run, where a script of ours listens to that name."""
    from server import PromptServer

    server = PromptServer.instance
    if server.client_id is not None:
        server.send_sync(name, data, server.client_id)
