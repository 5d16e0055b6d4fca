"""The command line of `tools/dev.py`."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from . import checks, comfyui, environment, fetch
from .common import AGAIN, ROOT, VENV, DevError, clean_env, say


def size(text: str) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT in pixels."""
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as 960x544")
    return int(found[1]), int(found[2])


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    main = argparse.ArgumentParser(
        prog="tools/dev.py", description="Ovi Native: set up, make a clip, run the tests.",
        epilog="ComfyUI is taken from COMFYUI_PATH, else from comfy-cli's workspace, else fetched into .comfyui.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("setup", help="make .venv and get ComfyUI (the other commands do it when needed)")

    demo = commands.add_parser("demo", help="make an mp4 with sound through a real ComfyUI, and print its path")
    demo.add_argument("--prompt", help="what to show and to hear; speech between <S> and <E>")
    demo.add_argument("--image", metavar="FILE", help="first frame of the clip")
    demo.add_argument("--seconds", type=float, help="length of the clip")
    demo.add_argument("--size", type=size, metavar="WxH", help="size in pixels, such as 960x544")
    demo.add_argument("--steps", type=int, help="sampling steps")
    demo.add_argument("--seed", type=int, help="another seed gives another clip")
    demo.add_argument("--model", metavar="NAME", help="model file to use, if more than one is there")

    run = commands.add_parser("run", help="run any workflow file through the server, and print what it wrote")
    run.add_argument("workflow", help="a workflow in UI or API format")
    run.add_argument("--tiny", action="store_true", help="with the tiny random models, small sizes and few steps")

    serve = commands.add_parser("serve", help="start a ComfyUI with the pack to open in a browser")
    for command, default in ((demo, None), (run, None), (serve, 8188)):
        command.add_argument("--port", type=int, default=default,
                             help=f"the server's port (default: {default or 'a free one'})")

    test = commands.add_parser("test", help="run every check and test")
    test.add_argument("--quick", action="store_true", help="leave out the tests marked slow: for before a commit")
    test.add_argument("--install-browser", action="store_true",
                      help="if there is no browser, install Chromium with apt-get (as root; CI=true asks for it too)")
    test.add_argument("pytest", nargs="*", metavar="-- PYTEST ARGUMENTS", help="passed on to pytest")

    fetch.add_options(commands.add_parser("weights", help="list the weight files that Ovi needs, and download them"))

    link = commands.add_parser("link", help="link this folder into an existing ComfyUI's custom_nodes")
    link.add_argument("path", nargs="?", help="the ComfyUI (default: COMFYUI_PATH, else comfy-cli's workspace)")
    return main


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit code; every foreseen failure ends in one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be anything, a screen's letters few
    options = parser().parse_args(arguments)
    stop_like_ctrl_c()
    try:
        return dispatch(options, list(arguments))
    except KeyboardInterrupt:
        return fail("Stopped; nothing is left running, and what was set up is kept.", 130)
    except DevError as failure:
        return fail(str(failure))
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            return fail(f"The disk is full: free some space on the disk that holds {ROOT}, then {AGAIN}.")
        if failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return fail(f"{failure.filename or ROOT} cannot be written by this account: {failure.strerror}.")
        raise


def dispatch(options: argparse.Namespace, arguments: list[str]) -> int:
    """Do what the command asks; demo, run, serve and weights continue under `.venv`'s Python."""
    if options.command == "link":
        say(f"Linked as {comfyui.link(options.path)}")
        return 0
    ready = environment.setup()
    if options.command == "setup":
        say(f"Ready: {ready.python}, ComfyUI {ready.comfyui.version} in {ready.comfyui.path} ({ready.comfyui.origin}).")
        return 0
    if options.command == "test":
        lane = checks.QUICK if options.quick else ()
        return checks.run_all(ready, [*lane, *options.pytest], options.install_browser)
    if Path(sys.prefix) != VENV:
        command = [str(ready.python), str(ROOT / "tools" / "dev.py"), *arguments]
        if os.name == "posix":
            os.execve(ready.python, command, clean_env())
        return subprocess.call(command, env=clean_env())
    if options.command == "weights":
        fetch.run(options)
        return 0
    from . import session

    {"demo": session.demo, "run": session.run, "serve": session.serve}[options.command](options, ready)
    return 0


def stop_like_ctrl_c() -> None:
    """Let a closed terminal or a polite kill end things in order, as Ctrl-C does."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup
            signal.signal(number, interrupt)


def fail(sentence: str, code: int = 1) -> int:
    """Print why, last, and return the exit code."""
    sys.stdout.flush()
    sys.stderr.write(("\r\033[K" if sys.stdout.isatty() else "") + f"{sentence}\n")
    return code
