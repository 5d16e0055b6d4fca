"""The pack's pages and templates in a folder whose name ComfyUI's server does not find again, as "ovi-native-main (1)".

A browser asks for such a name with %20 and the like. ComfyUI 0.30 hands folder names to aiohttp, which quotes them and
then compares them with the unquoted path: the script, the help pages and the template files answer 404. Routes with the
name as a pattern are compared as they should be.
"""

import re
from pathlib import Path

from aiohttp import web

SERVED = {"/extensions": "web", "/workflow_templates": "workflows"}  # ComfyUI repeats its routes below /api
PLAIN = re.compile(r"[A-Za-z0-9._+-]+")
HOPELESS = re.compile(r"[#%?{}\\]")


def problem(name: str) -> str | None:
    """A sentence for the log if the folder's name cannot be served: the front end asks for another address then."""
    if not HOPELESS.search(name):
        return None
    return (f"Ovi Native is in a folder called {name!a}, a name that ComfyUI's pages cannot ask for: help pages, "
            "templates and the download button will not work. Rename the folder to ovi-native and restart.")


def register(routes: web.RouteTableDef, pack: Path) -> None:
    """Serve the pack's files below addresses with its folder's name, where ComfyUI would not."""
    if PLAIN.fullmatch(pack.name) or HOPELESS.search(pack.name):
        return
    for address, folder in SERVED.items():
        routes.get(f"{address}/{{pack:{re.escape(pack.name)}}}/{{file:.+}}")(_server(pack / folder))


def _server(folder: Path):
    async def serve(request: web.Request) -> web.StreamResponse:
        root = folder.resolve()
        file = (root / request.match_info["file"]).resolve()
        if not file.is_relative_to(root) or not file.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(file)

    return serve
