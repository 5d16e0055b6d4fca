"""Running `tools/dev.py` as a command, and what its failures must look like."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from devlib import common
from devlib.common import ROOT

TOOL = ROOT / "tools" / "dev.py"
NOWHERE = "http://127.0.0.1:9/simple"  # the discard port, which nothing listens on


def run_tool(*arguments: str, tool: Path = TOOL, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(tool), *arguments], capture_output=True, text=True, timeout=timeout,
                          env=common.clean_env() | env)


def assert_sentence(result: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """The command failed, said why in one last line with these words, and showed no traceback of ours."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == code, result.stdout + result.stderr
    assert all(word in last for word in words), last
    assert last.endswith("."), last
    assert "devlib" not in result.stderr


def copy_of_tool(folder: Path) -> Path:
    """The tool and what it reads, in another folder, so that it starts from nothing there."""
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder)
    return folder / "tools" / "dev.py"


def without_index() -> dict[str, str]:
    """Environment in which no package index can be reached."""
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": NOWHERE, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "",
            "PIP_RETRIES": "1", "UV_HTTP_TIMEOUT": "5", "UV_HTTP_RETRIES": "0", "UV_CONCURRENT_DOWNLOADS": "1"}
