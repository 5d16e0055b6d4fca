"""A file on a local Hub, fetched or refused."""

import hashlib
import os
import threading

import pytest
from ovi_native.ovi_model.files import download
from ovi_native.ovi_model.files.catalogue import WeightFile

MB = 1_000_000
CONTENT = os.urandom(3 * MB + 17)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = WeightFile("one", "video_vae", "org/repo", "split_files/vae/one.safetensors", "vae", len(CONTENT))


def fetch(hub, files=(FILE,), report=lambda _: None, cancel=None):
    return download.fetch(files, report, cancel or threading.Event(), hub.url if hasattr(hub, "url") else hub)


def refused(hub, files=(FILE,)):
    """The sentence that a download ends with."""
    with pytest.raises(download.DownloadError) as error:
        fetch(hub, files)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".") and len(sentence) < 500
    return sentence


def left_in(folder):
    """Everything in a folder."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
