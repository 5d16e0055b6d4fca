"""Downloads from a local Hub: redirects, resume, and everything that goes wrong."""

import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from devlib.common import ROOT
from hub_server import COMMIT, HubServer, use_folders
from ovi_native.ovi_model import download, weights
from ovi_native.ovi_model.weights import WeightFile

MB = 1_000_000
CONTENT = os.urandom(3 * MB + 17)
FILE = WeightFile("one", "video_vae", "org/repo", "split_files/vae/one.safetensors", "vae", len(CONTENT))


@pytest.fixture(autouse=True)
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


@pytest.fixture
def one(hub):
    """How the Hub treats FILE."""
    return hub.faults[f"{FILE.repo}/{FILE.path}"]


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


# --- downloads that work ----------------------------------------------------------------------------------------------


def test_download_follows_redirects_and_moves_the_checked_file_into_place(hub, one, models, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    one.renamed_to = "org/new-name"
    seen = []
    path, = fetch(hub, report=seen.append)
    assert path == models / "vae" / "one.safetensors" and path.read_bytes() == CONTENT
    assert left_in(models / "vae") == ["one.safetensors"]
    assert [step.done for step in seen] == sorted(step.done for step in seen) and len(seen) >= 3
    assert (seen[-1].done, seen[-1].size, seen[-1].all_done, seen[-1].all_size) == (len(CONTENT),) * 4
    assert {step.phase for step in seen} == {download.DOWNLOADING}
    gets = [request for request in hub.requests if request.method == "GET"]
    assert f"/resolve/{COMMIT}/" in gets[0].path, "the bytes must be those of the commit that was looked up"
    assert {request.authorization for request in hub.requests if not request.cdn} == {"Bearer hf_secret"}
    assert {request.authorization for request in hub.bodies()} == {None}, "the token went to another host"


def test_several_files_count_as_one(hub, models):
    second = WeightFile("two", "model", "org/other", "two.safetensors", "diffusion_models", MB)
    hub.add(second.repo, second.path, CONTENT[:MB])
    seen = []
    paths = fetch(hub, (FILE, second), seen.append)
    assert [path.read_bytes() for path in paths] == [CONTENT, CONTENT[:MB]]
    assert paths[1] == models / "diffusion_models" / "two.safetensors"
    assert seen[-1].all_done == seen[-1].all_size == len(CONTENT) + MB
    methods = [request.method for request in hub.requests if not request.cdn]
    assert methods == ["HEAD", "HEAD", "GET", "GET"], "all files are looked up before the first byte"


def test_broken_connection_goes_on_where_it_broke(hub, one):
    one.cut_after = [MB, MB // 2]
    path, = fetch(hub)
    assert path.read_bytes() == CONTENT
    starts = [int(request.range.removeprefix("bytes=").removesuffix("-")) for request in hub.bodies()]
    assert starts[0] == 0 and 0 < starts[1] < starts[2]


def test_cancelled_download_is_kept_and_resumed(hub, one, models):
    cancel = threading.Event()
    one.pause_s = 0.005

    def stop_at_half(step):
        if step.done > len(CONTENT) // 2:
            cancel.set()

    with pytest.raises(download.Cancelled):
        fetch(hub, report=stop_at_half, cancel=cancel)
    part, = left_in(models / "vae")
    kept = (models / "vae" / part).stat().st_size
    assert re.fullmatch(r"\.one\.safetensors\.[0-9a-f]{12}\.part", part) and len(CONTENT) // 2 < kept < len(CONTENT)
    assert weights.partial_bytes(models / "vae" / "one.safetensors") == kept
    one.pause_s = 0.0
    hub.requests.clear()
    seen = []
    path, = fetch(hub, report=seen.append)
    assert path.read_bytes() == CONTENT and left_in(models / "vae") == ["one.safetensors"]
    assert [request.range for request in hub.bodies()] == [f"bytes={kept}-"]
    assert seen[0].phase == download.CHECKING and seen[-1].phase == download.DOWNLOADING


def test_complete_part_is_only_checked(hub):
    remote = download.look_up(FILE, hub.url)
    remote.partial.parent.mkdir(parents=True)
    remote.partial.write_bytes(CONTENT)
    path, = fetch(hub)
    assert path.read_bytes() == CONTENT and hub.bodies() == []


def test_killed_download_is_resumed(hub, one, models):
    one.pause_s = 0.02
    program = f"""
import sys, threading
sys.path[:0] = {[str(ROOT / "tools"), str(ROOT / "tests")]!r}
from devlib.pack import load_package
load_package()
import folder_paths
folder_paths.folder_names_and_paths["vae"] = ([{str(models / "vae")!r}], set())
from ovi_native.ovi_model import download
from ovi_native.ovi_model.weights import WeightFile
download.fetch([{FILE!r}], lambda step: print(step.done, flush=True), threading.Event(), {hub.url!r})
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while int(process.stdout.readline()) < MB:
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    kept = weights.partial_bytes(models / "vae" / "one.safetensors")
    assert MB <= kept < len(CONTENT)
    one.pause_s = 0.0
    hub.requests.clear()
    path, = fetch(hub)
    assert path.read_bytes() == CONTENT and [request.range for request in hub.bodies()] == [f"bytes={kept}-"]
    assert left_in(models / "vae") == ["one.safetensors"]


def test_server_without_ranges_still_resumes_right(hub, one):
    one.ignore_range, one.cut_after = True, [MB]
    path, = fetch(hub)
    assert path.read_bytes() == CONTENT and len(hub.bodies()) == 2


def test_part_of_another_release_is_dropped(hub, models):
    stale = models / "vae" / f".one.safetensors.{'0' * 12}.part"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    fetch(hub)
    assert left_in(models / "vae") == ["one.safetensors"]


# --- downloads that fail ----------------------------------------------------------------------------------------------


def test_corrupted_body_never_gets_the_files_name(hub, one, models):
    one.corrupt = True
    sentence = refused(hub)
    assert sentence.startswith("one.safetensors arrived damaged: its SHA-256 is ") and "was deleted" in sentence
    assert left_in(models / "vae") == []
    one.corrupt = False
    assert fetch(hub)[0].read_bytes() == CONTENT


def test_body_longer_than_announced_is_refused(hub, one, models):
    one.longer = MB
    assert "more than the announced 3.0 MB came" in refused(hub)
    assert "one.safetensors" not in left_in(models / "vae")
    one.longer = 0
    assert fetch(hub)[0].read_bytes() == CONTENT


def test_connection_that_stays_broken_ends_in_a_sentence_and_keeps_the_rest(hub, one, models):
    one.cut_after = [MB, *[0] * (download.RETRIES + 1)]
    sentence = refused(hub)
    kept = weights.partial_bytes(models / "vae" / "one.safetensors")
    assert 0 < kept <= MB + 64 * 1024
    assert "the connection broke" in sentence and f"{weights.human(kept)} of one.safetensors are kept" in sentence
    assert fetch(hub)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("fault, parts", [
    ({"status": 403, "error_code": "GatedRepo"}, ["accepted its terms", "https://huggingface.co/org/repo", "HF_TOKEN"]),
    ({"status": 401}, ["refuses access to org/repo (401)", "hf auth login"]),
    ({"status": 403}, ["refuses access to org/repo (403)"]),
    ({"status": 404, "error_code": "EntryNotFound"}, ["has no split_files/vae/one.safetensors in org/repo (404)"]),
    ({"status": 404, "error_code": "RepoNotFound"}, ["(404)", "https://huggingface.co/org/repo"]),
    ({"status": 503}, ["answers with an error (503)", "try again later"]),
    ({"status": 429}, ["answers with an error (429)"]),
    ({"no_hash": True}, ["does not tell the size and SHA-256", "HF_ENDPOINT"]),
    ({"cdn_status": 403}, ["refuses access", "(403)"]),
    ({"cdn_status": 503}, ["answers with an error (503)"]),
], ids=str)
def test_refusals_of_the_hub(hub, models, fault, parts):
    hub.add(FILE.repo, FILE.path, CONTENT, **fault)
    sentence = refused(hub)
    assert all(part in sentence for part in parts), sentence
    assert "one.safetensors" not in left_in(models / "vae")


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
    while not weights.partial_bytes(models / "vae" / "one.safetensors"):
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
    assert weights.free_bytes(small_disk) < len(CONTENT)
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
    (folder, needed, free), = weights.disk_shortages(wanted)
    assert (folder, needed) == (small_disk, 6 * MB) and free < 6 * MB
    assert weights.disk_shortages(wanted[1:]) == []
