"""What the registry, ComfyUI-Manager and a reader of the repository rely on."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pathspec
import pytest
import tomlkit
from devlib import checks, comfyui
from devlib.common import PACK_NAME, ROOT, clean_env, quiet_env, venv_program
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from PIL import Image
from tiny.models import write_checkpoint
from tiny.sizes import Sizes

PYPROJECT = tomlkit.parse((ROOT / "pyproject.toml").read_text("utf-8")).unwrap()
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
TORCH = {"torch", "torchvision", "torchaudio"}


def requirement_lines(path: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def names(lines: list[str]) -> set[str]:
    return {Requirement(line).name.lower().replace("_", "-") for line in lines}


def pack_sources() -> list[Path]:
    return [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "ovi_model").rglob("*.py"),
            *(ROOT / "server").rglob("*.py")]


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_requirements_and_project_dependencies_agree():
    assert requirement_lines(ROOT / "requirements.txt") == PROJECT["dependencies"]


def test_torch_is_left_to_comfyui():
    assert not names(PROJECT["dependencies"]) & TORCH


def test_every_import_is_declared_or_comes_with_comfyui():
    by_module = packages_distributions()
    found = comfyui.find()
    brought = names(requirement_lines(found.requirements)) | TORCH
    declared = names(PROJECT["dependencies"])
    used = set()
    comfyui_modules = {path.stem for path in found.path.iterdir() if path.is_dir() or path.suffix == ".py"}
    for path in pack_sources():
        for module in imported_modules(path) - comfyui_modules:
            distributions = {name.lower().replace("_", "-") for name in by_module.get(module, [module])}
            used |= distributions
            assert distributions & (declared | brought), f"{path.name} imports {module}, which nobody installs"
    assert declared <= used, f"declared but not imported: {declared - used}"


def test_project_fields():
    assert PROJECT["name"] == PACK_NAME and not PROJECT["name"].startswith("comfyui")
    Version(PROJECT["version"])
    assert 20 < len(PROJECT["description"]) < 200
    versions = SpecifierSet(PROJECT["requires-python"])
    assert "3.10" in versions and "3.9" not in versions
    assert all(url.startswith("https://github.com/ovi-native/ovi-native") for url in PROJECT["urls"].values())
    assert "Repository" in PROJECT["urls"]


def test_comfy_fields():
    assert COMFY["PublisherId"] == "ovi-native"
    assert COMFY["DisplayName"] == "Ovi Native"
    needed = SpecifierSet(COMFY["requires-comfyui"])
    oldest = ".".join(map(str, comfyui.OLDEST_COMFYUI))
    assert oldest in needed and "0.29.99" not in needed
    assert all((ROOT / folder).exists() for folder in COMFY["includes"])


def test_icon_is_in_the_repository_at_its_address():
    path = COMFY["Icon"].removeprefix("https://raw.githubusercontent.com/ovi-native/ovi-native/main/")
    with Image.open(ROOT / path) as icon:
        assert max(icon.size) <= 400 and icon.size[0] == icon.size[1]


def test_license_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and "9. Accepting Warranty" in text
    assert PROJECT["license"] == {"file": "LICENSE"}


def test_changelog_knows_this_version_or_announces_it():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## \[Unreleased\]", text, re.M)
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", text, re.M)
    assert not released or released[0] == PROJECT["version"]


def test_pins_of_the_tools_agree():
    pinned = {r.name: str(r.specifier) for r in map(Requirement, requirement_lines(ROOT / "requirements-dev.txt"))}
    assert {name: pinned[name] for name in TORCH} == {
        "torch": "==2.11.0", "torchvision": "==0.26.0", "torchaudio": "==2.11.0"}
    assert pinned["comfy-cli"] == "==1.23.0"


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX systems")
def test_ci_runs_the_one_command():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text("utf-8").splitlines()[-1] == "exec python3 tools/dev.py test"


def test_repository_leaves_out_what_the_tool_makes():
    made = [".venv/x", ".comfyui/main.py", ".run/output/a.mp4", ".setup/lock", "nodes/__pycache__/a.pyc", "node.zip",
            ".tiny_ovi/short.safetensors"]
    ignored = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.split() == made


def test_archive_check_sees_what_is_missing_and_what_is_too_much():
    good = ["__init__.py", "nodes/__init__.py", "ovi_model/__init__.py", "server/__init__.py", "pyproject.toml",
            "requirements.txt", "LICENSE", "README.md", "tools/install_tiny.py", "tools/tiny_ovi/files.py",
            "assets/tiny_ovi/model.safetensors", "workflows/a.json"]
    assert checks.archive_problems(good) == []
    assert checks.archive_problems(good[1:]) == ["__init__.py is missing"]
    for extra in ("tests/test_a.py", ".ci/run", "tools/devlib/cli.py", "tools/dev.py"):
        assert checks.archive_problems([*good, extra]) == [f"{extra} does not belong in it"]


def test_archive_of_comfy_cli_is_right(capfd):
    assert checks.pack_check(), capfd.readouterr().out


def test_comfy_cli_validates_without_a_warning():
    result = subprocess.run([venv_program("comfy"), "--no-json", "node", "validate"], cwd=ROOT, capture_output=True,
                            text=True, env=quiet_env())
    assert result.returncode == 0 and "warning" not in (result.stdout + result.stderr).lower(), result.stdout


def test_no_script_is_loaded_twice_and_no_test_reaches_the_browser():
    assert "web" not in COMFY
    assert not [path for path in (ROOT / "web").rglob("*.js") if "test" in path.name]


def test_users_convert_with_what_the_archive_holds(tmp_path):
    """Without the tools of development, from a ComfyUI's custom_nodes, which is found by where the pack is."""
    host = tmp_path / "my ComfyUI"
    pack = host / "custom_nodes" / "ovi-native"
    pack.mkdir(parents=True)
    for part in comfyui.find().path.iterdir():
        if part.name != "custom_nodes":
            (host / part.name).symlink_to(part)
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text("utf-8").splitlines())
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(lambda name: (ROOT / name).is_file(), tracked.stdout.splitlines()):
        if not ignored.match_file(name):
            (pack / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, pack / name)
    source = write_checkpoint(tmp_path, sizes=Sizes(blocks=1))
    command = [sys.executable, pack / "tools" / "convert.py", source, tmp_path / "out.safetensors", "--dtype", "int8"]
    env = clean_env()
    env.pop("COMFYUI_PATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "layers quantised" in done.stdout, done.stderr
    shutil.rmtree(pack / "tools" / "converting")
    (host / "main.py").unlink()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "There is no ComfyUI in" in done.stderr and "COMFYUI_PATH" in done.stderr
