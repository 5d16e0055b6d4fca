"""What tests of downloads need: empty model folders and a Hub."""

import huggingface_hub.utils
import pytest
import requests
from ovi_native.ovi_model.files import download
from support.downloads import CONTENT, FILE
from support.hub_server import HubServer, use_folders


@pytest.fixture
def models(tmp_path, monkeypatch):
    """ComfyUI's model folders, empty."""
    use_folders(tmp_path / "models", monkeypatch)
    return tmp_path / "models"


@pytest.fixture
def hub(monkeypatch):
    """A Hub of the test's own with FILE on it, and no waiting between attempts."""
    monkeypatch.setattr(download, "RETRY_PAUSE_S", 0.01)
    with HubServer().running() as server:
        server.add(FILE.repo, FILE.path, CONTENT)
        yield server


@pytest.fixture(params=["httpx", "requests"])
def client(request, monkeypatch):
    """The HTTP client of huggingface_hub from 1.0 on, and the one before."""
    if request.param == "requests":
        monkeypatch.setattr(huggingface_hub.utils, "get_session", requests.Session)
    return request.param


@pytest.fixture
def one(hub):
    """How the Hub treats FILE."""
    return hub.faults[f"{FILE.repo}/{FILE.path}"]
