"""A kit for a machine without network and without ComfyUI, such as a rented GPU that has only PyTorch's packages.

    python3 tools/bare_kit.py pack KIT [--python-version 3.12] [--part-mib 56]    on a machine with a package index
    python3 tools/bare_kit.py install KIT/1 KIT/2 --into /tmp/ovi                 on the bare one, from this checkout
    /tmp/ovi/python benchmarks/gpu.py --kit /tmp/ovi --out FOLDER

`pack` writes numbered parts, each small enough to travel by itself: the wheels that ComfyUI and the pack need beside
what a PyTorch machine has (Linux, x86-64), ComfyUI's source without page, tests and paid nodes, and the shipped
workflows at tiny size in API format (turning them into it needs comfy-cli, which stays at home). `install` unpacks
parts into one folder, outside this one; nothing else of the machine changes. It may be called once for each part.
"""

from __future__ import annotations

import argparse
import compileall
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("comfy-kitchen", "comfy-aimdo", "torchsde", "trampoline", "ftfy", "wcwidth")  # to import `comfy` at all
LATER = ("av", "alembic", "SQLAlchemy", "greenlet", "Mako", "blake3", "simpleeval", "pydantic-settings",
         "python-dotenv", "websocket-client", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",
         "filelock", "pytest", "pluggy", "iniconfig", "pygments", "packaging")
OPTIONAL = ("diffusers", "sageattention")  # to run the reference beside ours; a kernel in pure Triton
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64")
LEFT_OUT = {"tests", "tests-unit", "comfy_api_nodes", "blueprints", "web", "models", "output", "user", "temp",
            "custom_nodes", ".git", ".github"}
SOURCE, WORKFLOWS, PACKAGES = "comfyui", "workflows", "packages"
MIB = 1 << 20


def pack(kit: Path, python_version: str, part_mib: int) -> None:
    """Write the kit's parts; what is there is replaced."""
    sys.path.insert(0, str(ROOT / "tools"))
    from devlib import comfyui
    from devlib.common import DevError

    found = comfyui.find()
    if found is None:
        raise DevError("There is no ComfyUI to pack: run `python3 tools/dev.py setup` first.")
    shutil.rmtree(kit, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pinned = [f"{name}=={metadata.version(name)}" for name in (*FIRST, *LATER)]
        files = [*download(pinned, work, python_version), *optional(work, python_version)]
        first = {name.lower().replace("-", "_") for name in FIRST}
        files.sort(key=lambda file: file.name.split("-")[0].lower() not in first)
        files.append(archive(found.path, work / f"{SOURCE}.tar.gz"))
        files.append(write_workflows(found, work / f"{WORKFLOWS}.json"))
        for number, part in enumerate(split(files, part_mib * MIB), 1):
            (kit / str(number)).mkdir(parents=True)
            for file in part:
                shutil.copy2(file, kit / str(number))
            size = sum(file.stat().st_size for file in part) / MIB
            print(f"{kit / str(number)}: {size:.1f} MiB, {', '.join(file.name.split('-')[0] for file in part)}")


def download(names: Sequence[str], folder: Path, python_version: str) -> list[Path]:
    """Wheels of these packages for the other machine, at the versions that are installed here."""
    tags = [option for platform in PLATFORMS for option in ("--platform", platform)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                    "--python-version", python_version, "--implementation", "cp", *tags, "-d", str(folder), *names],
                   check=True)
    return sorted(folder.glob("*.whl"))


def optional(folder: Path, python_version: str) -> list[Path]:
    """Those of the optional packages that can be had; each alone, as a missing one must not stop the others."""
    found = []
    for name in OPTIONAL:
        try:
            found += download([name], folder / name, python_version)
        except subprocess.CalledProcessError:
            print(f"without {name}")
    return found


def archive(comfyui: Path, target: Path) -> Path:
    """ComfyUI's source as an archive."""
    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(member.name).parts[1:]
        return None if parts and (parts[0] in LEFT_OUT or "__pycache__" in parts) else member

    with tarfile.open(target, "w:gz") as tar:
        tar.add(comfyui.resolve(), SOURCE, filter=wanted)
    return target


def write_workflows(found, target: Path) -> Path:
    """Every shipped workflow in API format at tiny size, by name."""
    from devlib import weights, workflows
    from devlib.client import ComfyClient
    from devlib.server import ComfyServer

    weights.ensure_tiny(Path(sys.executable))
    with tempfile.TemporaryDirectory() as base, ComfyServer(Path(base), found=found, models=weights.MODELS,
                                                            cpu=True) as server, ComfyClient(server.url) as client:
        info = client.object_info()
    apis = {path.stem: workflows.shrink(workflows.to_api(workflows.load(path), info), info)
            for path in sorted((ROOT / "workflows").glob("*.json"))}
    target.write_text(json.dumps(apis), "utf-8")
    return target


def split(files: Sequence[Path], largest: int) -> Iterator[list[Path]]:
    """The files in their order, in groups of at most `largest` bytes."""
    part: list[Path] = []
    for file in files:
        if part and sum(other.stat().st_size for other in [*part, file]) > largest:
            yield part
            part = []
        part.append(file)
    yield part


def install(parts: Sequence[Path], target: Path) -> None:
    """Unpack parts into `target`, and write its `python`, which runs this interpreter with what was unpacked."""
    packages = target / PACKAGES
    packages.mkdir(parents=True, exist_ok=True)
    for part in parts:
        for wheel in part.glob("*.whl"):  # an archive of what belongs on the path; pip may be missing
            with zipfile.ZipFile(wheel) as content:
                content.extractall(packages)
        if (part / f"{SOURCE}.tar.gz").is_file():
            with tarfile.open(part / f"{SOURCE}.tar.gz") as tar:
                tar.extractall(target, filter="data")
            (target / SOURCE / "custom_nodes").mkdir(exist_ok=True)
        if (part / f"{WORKFLOWS}.json").is_file():
            shutil.copy2(part / f"{WORKFLOWS}.json", target)
    compileall.compile_dir(target, quiet=2, workers=0)  # once, not at the start of each server
    python = target / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{packages}" COMFYUI_PATH="{target / SOURCE}"\n'
                      f'exec "{sys.executable}" "$@"\n', "utf-8")
    python.chmod(0o755)
    print(f"Ready: {python}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write the kit")
    packing.add_argument("kit", type=Path)
    packing.add_argument("--python-version", default="3.12", help="of the bare machine (default: 3.12)")
    packing.add_argument("--part-mib", type=int, default=56, help="size of a part (default: 56)")
    installing = commands.add_parser("install", help="unpack parts of it")
    installing.add_argument("parts", type=Path, nargs="+")
    installing.add_argument("--into", type=Path, required=True, help="a folder outside this checkout")
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.kit, args.python_version, args.part_mib)
    else:
        install(args.parts, args.into.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
