"""A real ComfyUI server with the tiny random models, shared by every test that needs one.

`conftest.py` imports these fixtures. The server starts once per test session, on a base directory of its own.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devlib import comfyui, weights
from devlib.client import ComfyClient
from devlib.server import ComfyServer
from devlib.weights import TINY
from tiny_ovi.clip_files import LESSON, write_lesson
from tiny_ovi.files import FIRST_FRAME, INPUT, SHIPPED, install


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder that holds the tiny bundle and the trained tiny Ovi, and nothing else."""
    weights.ensure_tiny(Path(sys.executable))
    models = tmp_path_factory.mktemp("models")
    install(models)
    for folder, name in weights.TINY_FILES.values():
        (models / folder).mkdir(exist_ok=True)
        shutil.copyfile(weights.MODELS / folder / name, models / folder / name)
    return models


@pytest.fixture(scope="session")
def sound_vae(tiny_models: Path) -> Any:
    """The bundle's audio VAE and vocoder, loaded."""
    from ovi_native.ovi_model.media import audio_vae

    return audio_vae.load_audio_vae(*(str(tiny_models / "vae" / TINY[role]) for role in ("audio_vae", "vocoder")))


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[ComfyServer]:
    """A running server with the pack and the tiny models, sending latent previews. Tests share it: leave it idle."""
    found = comfyui.find()
    if found is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH or run tools/dev.py setup")
    base = tmp_path_factory.mktemp("comfyui")
    (base / "input").mkdir()
    shutil.copyfile(SHIPPED / FIRST_FRAME, base / "input" / INPUT)
    write_lesson(base / "input" / LESSON, new=2, known=2)
    with ComfyServer(base, found=found, models=tiny_models, args=("--preview-method", "latent2rgb")) as server:
        yield server


@pytest.fixture
def comfy_client(comfy_server: ComfyServer) -> Iterator[ComfyClient]:
    """A websocket of the test's own to the shared server."""
    with ComfyClient(comfy_server.url) as client:
        yield client


@pytest.fixture(scope="session")
def object_info(comfy_server: ComfyServer) -> dict[str, Any]:
    """The schemas of all nodes that the shared server has."""
    with ComfyClient(comfy_server.url) as client:
        return client.object_info()
