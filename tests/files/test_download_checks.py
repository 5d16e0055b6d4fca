"""Downloads: whose file it is, hashes that are known, and disks that are full."""

import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from ovi_native.ovi_model.files import disk, download, model_folders
from ovi_native.ovi_model.files.catalogue import WeightFile
from support.downloads import CONTENT, FILE, MB, SHA256, fetch, left_in, refused
from support.hub_server import COMMIT

pytestmark = pytest.mark.usefixtures("models")


# --- whose file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
def test_what_is_there_already_is_not_replaced(hub, models, kind):
    target, other = models / "vae" / "one.safetensors", models / "other"
    target.parent.mkdir(parents=True)
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_bytes(b"precious")
    else:
        target.symlink_to(other)
        if kind == "link":
            other.write_bytes(b"precious")
    sentence = refused(hub)
    assert f"{target} is there already" in sentence and "is not replaced: delete it or" in sentence
    assert hub.requests == [] and left_in(models / "vae") == ["one.safetensors"]
    assert kind != "file" or target.read_bytes() == b"precious"
    assert kind != "link" or other.read_bytes() == b"precious"
    assert kind != "dangling" or not other.exists()


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_during_the_download_is_not_replaced(hub, models, links, monkeypatch):
    if not links:  # as on exFAT
        monkeypatch.setattr(disk.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    target = models / "vae" / "one.safetensors"

    def put(step):
        if step.done == step.size:
            target.write_bytes(b"precious")

    with pytest.raises(download.DownloadError, match=r"is there already \(8 bytes\) and is not replaced"):
        fetch(hub, report=put)
    assert target.read_bytes() == b"precious"
    target.unlink()
    hub.requests.clear()
    assert fetch(hub)[0].read_bytes() == CONTENT and hub.bodies() == [], "what had arrived was lost"
    assert left_in(models / "vae") == ["one.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "pipe", "folder"])
def test_unfinished_download_that_is_a_link_is_not_followed(hub, models, kind):
    partial, other = download.look_up(FILE, hub.url).partial, models / "other"
    partial.parent.mkdir(parents=True)
    other.write_bytes(b"precious")
    if kind == "hard link":
        os.link(other, partial)
    elif kind == "pipe":
        os.mkfifo(partial)
    elif kind == "folder":
        partial.mkdir()
    else:
        partial.symlink_to(other if kind == "symlink" else models / "nowhere")
    sentence = refused(hub)
    assert f"{partial} stands where the unfinished download goes" in sentence and "delete it" in sentence
    assert other.read_bytes() == b"precious" and not (models / "nowhere").exists() and hub.bodies() == []
    assert model_folders.partial_bytes(model_folders.target(FILE)) == 0


# --- hashes -----------------------------------------------------------------------------------------------------------


def pinned(sha256=SHA256, revision=COMMIT):
    return WeightFile("one", FILE.role, FILE.repo, FILE.path, FILE.folder, FILE.size, sha256, revision)


def test_pinned_file_is_fetched_from_its_commit(hub, one):
    one.revisions = (COMMIT,)
    assert fetch(hub, [pinned()])[0].read_bytes() == CONTENT
    assert {request.path.split("/")[4] for request in hub.requests if not request.cdn} == {COMMIT}


def test_pinned_commit_that_is_gone_is_no_hindrance_as_long_as_the_hash_is_right(hub, models):
    assert fetch(hub, [pinned(revision="f" * 40)])[0].read_bytes() == CONTENT
    model_folders.target(FILE).unlink()
    assert "has another one.safetensors" in refused(hub, [pinned("0" * 64, "f" * 40)])
    assert left_in(models / "vae") == []


def test_file_that_changed_on_the_hub_is_refused_before_a_byte(hub, models):
    """Of several files nothing is fetched, also not the others."""
    second = WeightFile("two", "model", "org/other", "two.safetensors", "diffusion_models", MB)
    hub.add(second.repo, second.path, CONTENT[:MB])
    sentence = refused(hub, [second, pinned("0" * 64)])
    assert f"{'0' * 64} was expected" in sentence and "Nothing was fetched; update Ovi Native" in sentence
    assert hub.bodies() == [] and left_in(models / "vae") == left_in(models / "diffusion_models") == []


def test_pinned_file_that_arrives_otherwise_is_deleted(hub, one, models):
    one.corrupt = True
    assert "arrived damaged" in refused(hub, [pinned()])
    assert left_in(models / "vae") == []


def test_unknown_file_on_the_hub_stops_before_the_others_begin(hub, models):
    gone = WeightFile("gone", "model", "org/repo", "gone.safetensors", "diffusion_models", MB)
    assert "has no gone.safetensors in org/repo" in refused(hub, (FILE, gone))
    assert hub.bodies() == [] and left_in(models / "vae") == []


def test_no_network(models):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sentence = refused(f"http://127.0.0.1:{port}")
    assert sentence.startswith(f"127.0.0.1:{port} cannot be reached") and "HF_ENDPOINT" in sentence
    assert not (models / "vae").exists()


def test_server_that_is_no_hub():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Portal(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    portal = HTTPServer(("127.0.0.1", 0), Portal)
    threading.Thread(target=portal.serve_forever, daemon=True).start()
    try:
        assert "does not tell the size and SHA-256 of one.safetensors" in refused(
            f"http://127.0.0.1:{portal.server_address[1]}")
    finally:
        portal.shutdown()
        portal.server_close()


def test_target_folder_that_cannot_be_made(hub, models):
    models.mkdir()
    (models / "vae").write_text("a file where the folder should be")
    assert "cannot be written in" in refused(hub)


def test_two_programs_do_not_write_one_file(hub, one, models):
    one.pause_s = 0.02
    first = threading.Thread(target=fetch, args=(hub,))
    first.start()
    while not model_folders.partial_bytes(models / "vae" / "one.safetensors"):
        time.sleep(0.01)
    assert refused(hub) == "one.safetensors is being downloaded by another program: wait for it, or stop it."
    first.join()
    assert (models / "vae" / "one.safetensors").read_bytes() == CONTENT
    assert left_in(models / "vae") == ["one.safetensors"]


@pytest.fixture
def small_disk(models):
    """A disk of 5 MB as ComfyUI's vae folder."""
    place = models / "vae"
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("making a small disk needs root on Linux")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_is_found_before_the_first_byte(hub, small_disk):
    (small_disk / "other").write_bytes(bytes(3 * MB))
    sentence = refused(hub)
    assert re.match(rf"The download needs 3\.0 MB in {re.escape(str(small_disk))} and the disk has 2\.\d MB free: free "
                    r"\d", sentence)
    assert hub.bodies() == [] and left_in(small_disk) == ["other"]


def test_what_is_kept_counts_towards_the_disk(hub, small_disk):
    cancel = threading.Event()
    with pytest.raises(download.Cancelled):
        fetch(hub, report=lambda step: cancel.set() if step.done > 2 * MB else None, cancel=cancel)
    (small_disk / "other").write_bytes(bytes(15 * MB // 10))  # less is free now than the whole file takes
    assert disk.free_bytes(small_disk) < len(CONTENT)
    assert fetch(hub)[0].read_bytes() == CONTENT


def test_disk_that_fills_up_on_the_way(hub, small_disk):
    def fill(step):
        if step.done > MB and not (small_disk / "other").exists():
            with (small_disk / "other").open("wb", buffering=0) as other:
                while os.statvfs(small_disk).f_bavail > 100:
                    other.write(bytes(4096))

    with pytest.raises(download.DownloadError, match=r"The disk that holds \S+ is full: free \S+ MB and start the "
                       r"download again; \S+ MB of one\.safetensors are kept\."):
        fetch(hub, report=fill)
    (small_disk / "other").unlink()
    hub.requests.clear()
    assert fetch(hub)[0].read_bytes() == CONTENT
    assert int(hub.bodies()[0].range.removeprefix("bytes=").removesuffix("-")) >= MB


def test_disks_are_added_up_separately(small_disk, tmp_path):
    wanted = [(small_disk / "a", 3 * MB), (small_disk / "b", 3 * MB), (tmp_path / "c" / "d", MB)]
    (folder, needed, free), = disk.shortages(wanted)
    assert (folder, needed) == (small_disk, 6 * MB) and free < 6 * MB
    assert disk.shortages(wanted[1:]) == []
