"""What happens with a running server: demo, run, serve. Runs under `.venv`'s Python."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from standalone import standalone

from . import weights, workflows
from .client import ComfyClient, RejectedError, Run
from .common import ROOT, RUN, DevError, say, show
from .environment import Ready
from .media import read_media
from .server import ComfyServer, ServerError

RUN_TIMEOUT_S = 24 * 3600.0
LINE_EVERY_S = 2.0


def elapsed() -> float:
    """Seconds since the user's command started; this process took its place, and kept its birthday."""
    return time.time() - psutil.Process().create_time()


class Progress:
    """Tells what a run is doing: node names as they start, and their steps."""

    def __init__(self, api: workflows.Api, object_info: workflows.ObjectInfo) -> None:
        self.names = {number: object_info.get(node["class_type"], {}).get("display_name") or node["class_type"]
                      for number, node in api.items()}
        self.sampling = False
        self.last_line = 0.0

    def __call__(self, kind: str, data: Any) -> None:
        name = self.names.get(str(data.get("node")), "") if isinstance(data, dict) else ""
        if kind == "executing" and name:
            say(f"  {name}")
        elif kind == "progress" and data.get("max", 0) > 1:
            if not self.sampling and "Sampler" in name:
                self.sampling = True
                say(f"  sampling started {elapsed():.1f} s after the command")
            now, finished = time.monotonic(), data["value"] >= data["max"]
            if finished or now - self.last_line >= LINE_EVERY_S:
                self.last_line = now
                show(f"  {name} {data['value']}/{data['max']}", last=finished)


@contextlib.contextmanager
def running_server(ready: Ready, port: int | None, *args: str) -> Iterator[ComfyServer]:
    """A server on the project's run directory for the duration of a `with`; says where it is, or what it lacks."""
    say(f"Starting ComfyUI {ready.comfyui.version}")
    with ComfyServer(RUN, found=ready.comfyui, python=ready.python, port=port, args=args) as server:
        say(f"  ready at {server.url}, {elapsed():.1f} s after the command")
        if server.pack_failure():
            say(f"  without our nodes: {server.pack_failure()}")
        yield server


def execute(server: ComfyServer, client: ComfyClient, api: workflows.Api, shown: dict[str, Any] | None,
            info: workflows.ObjectInfo) -> Run:
    """Run one workflow to its end with progress; a server that dies meanwhile is reported as such."""
    try:
        run = client.run(api, shown, timeout=RUN_TIMEOUT_S, on_event=Progress(api, info))
    except DevError:
        server.check_alive("while running the workflow")
        raise
    if run.status != "success":
        raise DevError("The run was interrupted before it finished.")
    return run


def demo(options: argparse.Namespace, ready: Ready) -> None:
    """The main job: a prompt, perhaps an image, becomes an mp4 with sound; ends with its path."""
    image = Path(options.image).expanduser() if options.image else None
    if image and not image.is_file():
        raise DevError(f"There is no image {image}.")
    with running_server(ready, options.port) as server, ComfyClient(server.url) as client:
        info = client.object_info()
        if "OviModelLoader" not in info:
            raise ServerError(f"ComfyUI could not load the pack: {server.pack_failure() or 'its nodes are missing'}; "
                              f"the whole log is {server.log}.", server.log_tail())
        files = weights.choose(workflows.offered_files(info), options.model)
        world, tiny = files == weights.WORLD, files in (weights.WORLD, weights.TINY)
        path = ROOT / "workflows" / f"ovi_{'image' if image else 'text'}_to_av{'_tiny' if tiny else ''}.json"
        workflow = workflows.load(path)
        api = workflows.to_api(workflow, info)
        wanted = wanted_options(options)
        if world:
            weights.ensure_world(ready.python)
            say("Using the trained tiny Ovi, which knows a toy world (docs/tiny-world.md). Real weights are listed in "
                "README.md.")
        else:
            if tiny:
                weights.ensure_tiny(ready.python)
            say(f"Using {files['model']}" + (": its weights are random, the clip will be noise." if tiny else ""))
            api = workflows.set_files(api, files)
        if image:
            wanted["image"] = client.upload(image)
        api = workflows.set_options(api, wanted)
        say(f"Running {path.relative_to(ROOT)}")
        run = execute(server, client, api, workflows.show_in_ui(workflow, api, info), info)
    clips = [out.path(RUN) for out in run.outputs if out.filename.endswith(".mp4") and out.type == "output"]
    if not clips:
        raise DevError(f"The workflow {path.name} ran but wrote no mp4; the server's log is {server.log}.")
    say(f"Done in {elapsed():.1f} s: {streams(clips[-1])}.")
    if world:
        say(f"Measured in the clip: {measured(clips[-1])}.")
    say(str(clips[-1]))


def wanted_options(options: argparse.Namespace) -> dict[str, Any]:
    """The demo's options that were given, by the names of the nodes' inputs."""
    wanted = {name: getattr(options, name) for name in ("steps", "seed") if getattr(options, name) is not None}
    if options.prompt is not None:  # the sound is described in the prompt itself, not in the workflow's caption
        wanted |= {"scene": options.prompt, "audio_caption": ""}
    if options.seconds is not None:
        wanted |= {"seconds": options.seconds, "frames": 0}  # a number of frames would win over seconds
    if options.size is not None:
        wanted |= {"aspect": "custom", "width": options.size[0], "height": options.size[1]}
        if options.image:
            wanted["resize"] = "crop"  # else the image decides the size
    return wanted


def streams(path: Path) -> str:
    """What a clip holds, in words; raises DevError when it lacks video or sound."""
    import av

    with av.open(str(path)) as clip:
        if not clip.streams.video or not clip.streams.audio:
            raise DevError(f"{path} was written but has no {'sound' if clip.streams.video else 'video'} in it.")
        video, audio = clip.streams.video[0], clip.streams.audio[0]
        seconds = float((video.duration or 0) * (video.time_base or 0))
        return (f"{video.width}x{video.height}, {video.frames} frames, {float(video.average_rate or 0):g} fps, "
                f"{seconds:.2f} s, sound at {audio.rate} Hz")


def measured(path: Path) -> str:
    """What the toy world's detectors see and hear in a clip, in a sentence."""
    clip = read_media(path.read_bytes())
    sound = standalone("sound", "tiny_world")
    samples = clip.sound.mean(axis=1)
    if clip.rate != sound.SAMPLE_RATE:
        return f"nothing, as its sound is at {clip.rate} Hz"
    return standalone("measure", "tiny_world").describe(clip.frames, samples).sentence


def run(options: argparse.Namespace, ready: Ready) -> None:
    """Run any workflow file; ends with the paths of what it wrote."""
    path = Path(options.workflow)
    workflow = workflows.load(path)
    with running_server(ready, options.port) as server, ComfyClient(server.url) as client:
        info = client.object_info()
        api = workflows.to_api(workflow, info)
        if options.tiny:
            weights.ensure_tiny(ready.python)
            api = workflows.shrink(api, info)
        shown = workflows.show_in_ui(workflow, api, info) if workflows.is_ui(workflow) else None
        say(f"Running {path}")
        try:
            finished = execute(server, client, api, shown, info)
        except RejectedError as refusal:
            absent = any(error.get("type") == "value_not_in_list" for error in refusal.reasons)
            hint = " Put the files into the model folders, or add --tiny." if absent and not options.tiny else ""
            raise DevError(f"{refusal}{hint}") from None
    say(f"Done in {elapsed():.1f} s.")
    for output in finished.outputs:
        say(str(output.path(RUN)))


def serve(options: argparse.Namespace, ready: Ready) -> None:
    """A server with the pack installed to open in a browser, until Ctrl-C."""
    weights.ensure_tiny(ready.python)
    with running_server(ready, options.port, "--preview-method", "auto") as server:
        say(f"Open {server.url} in a browser. Ctrl-C stops the server. Its log is {server.log}.")
        while True:
            server.check_alive()
            time.sleep(0.5)
