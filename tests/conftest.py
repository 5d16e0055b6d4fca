"""Loads the pack the way ComfyUI does, and finds the reference's numbers."""

import os
import sys
from pathlib import Path

import pytest

# Tiny models are thousands of tiny operations: on a busy machine, sharing each among threads costs far more than it
# saves. Servers started by tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# `python -m pytest` puts the root first, where the pack's `nodes` would shadow ComfyUI's.
sys.path[:] = [str(ROOT / "tools"), str(TESTS), *(p for p in sys.path if p not in ("", str(ROOT)))]

from devlib.pack import import_pack  # noqa: E402
from support.server_fixtures import comfy_client, comfy_server, object_info, sound_vae, tiny_models  # noqa: E402, F401

import_pack()

from support.loading_state import dynamic_loading, either_loading  # noqa: E402, F401 (imports ComfyUI)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", metavar="FOLDER", help="the reference's numbers (default: ../shared/golden)")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder with the reference's numbers; tests that need it skip where none was named and none is there."""
    named = request.config.getoption("--golden")
    folder = Path(named) if named else ROOT.parent / "shared" / "golden"
    if not folder.is_dir() and not named:
        pytest.skip(f"no reference numbers at {folder}")
    return folder
