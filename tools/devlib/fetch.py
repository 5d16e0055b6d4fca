"""`tools/dev.py weights`: list the weight files that Ovi needs, and download the missing ones. Runs in `.venv`.

The work is the pack's own (`ovi.needs`, `files.download`); here it gets its folders and its face.
"""

from __future__ import annotations

import argparse
import importlib
import threading
import time
from pathlib import Path
from typing import Any

from .common import AGAIN, DevError, say, show
from .pack import PACKAGE, load_package
from .weights import MODELS

LINE_EVERY_S = 2.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options; their values are checked against the pack's own table when it runs."""
    parser.add_argument("--variant", metavar="NAME", help="720x720_5s, 960x960_5s (default) or 960x960_10s")
    parser.add_argument("--precision", metavar="NAME", help="model file to download: bf16 (default) or fp8")
    parser.add_argument("--download", action="store_true", help="download what is missing, from the Hugging Face Hub")
    parser.add_argument("--models", metavar="FOLDER", type=Path, default=MODELS,
                        help="a ComfyUI's models folder to look in and to download into (default: .run/models, which "
                             "the demo uses); the models of the ComfyUI in use are looked through as well")


def run(options: argparse.Namespace) -> None:
    """List the files; with `options.download` fetch the missing ones. Raises DevError with the reason if it cannot."""
    load_package()
    table = importlib.import_module(f"{PACKAGE}.ovi_model.ovi.catalogue")
    weights = importlib.import_module(f"{PACKAGE}.ovi_model.files.catalogue")
    folders = importlib.import_module(f"{PACKAGE}.ovi_model.files.model_folders")
    human = importlib.import_module(f"{PACKAGE}.ovi_model.files.disk").human
    needs = importlib.import_module(f"{PACKAGE}.ovi_model.ovi.needs").needs
    variants = importlib.import_module(f"{PACKAGE}.ovi_model.ovi.variants")
    use_folders(options.models.expanduser().absolute(), {file.folder for file in table.FILES.values()})
    variant = options.variant or variants.DEFAULT_VARIANT
    precision = options.precision or table.DEFAULT_PRECISION
    try:
        listed = needs(variant, precision)
    except ValueError as unknown:
        raise DevError(str(unknown)) from None
    say(f"Ovi {variant} needs:")
    for need in listed:
        say(f"  {need.line()}")
    if note := table.restricted(need.file for need in listed):
        say(note)
    absent = weights.missing(listed)
    if not absent:
        say("All files are there.")
        return
    if weights.unpinned(absent):
        say(weights.unpinned(absent))
    size = human(weights.bytes_to_fetch(listed))
    if not options.download:
        say(f"{len(absent)} of {len(listed)} files are missing, {size}. Add --download to fetch them into "
            f"{options.models}.")
        return
    for file in absent:
        say(f"  {file.name} goes to {folders.target(file).parent}")
    say(f"Downloading {size}; Ctrl-C stops, and the same command goes on from there.")
    download(absent, human)


def use_folders(models: Path, folders: set[str]) -> None:
    """Make `models` the first place for each kind of file; the folders of the ComfyUI in use stay behind it."""
    import folder_paths  # ComfyUI's
    from utils.extra_config import load_extra_path_config

    if (models / "main.py").is_file():
        raise DevError(f"{models} is a ComfyUI, not its models folder: give {models / 'models'}.")
    own = Path(folder_paths.base_path) / "extra_model_paths.yaml"
    if own.is_file():
        load_extra_path_config(str(own))
    for folder in folders:
        folder_paths.add_model_folder_path(folder, str(models / folder), is_default=True)


def download(files: list[Any], human: Any) -> None:
    """Fetch the files with a line of progress."""
    engine = importlib.import_module(f"{PACKAGE}.ovi_model.files.download")
    shown = 0.0

    def progress(now: Any) -> None:
        nonlocal shown
        finished = now.done == now.size
        if finished or time.monotonic() - shown > LINE_EVERY_S:
            shown = time.monotonic()
            show(f"  {now.phase} {now.file.name}: {human(now.done)} of {human(now.size)}, all {human(now.all_done)} of "
                 f"{human(now.all_size)}", last=finished)

    try:
        for path in engine.fetch(files, progress, threading.Event()):
            say(f"  {path}")
    except engine.DownloadError as failure:
        raise DevError(f"{failure} To go on later, {AGAIN}.") from None
    say("All files are there.")
