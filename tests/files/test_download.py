"""Downloads from a local Hub: redirects, resume, and everything that goes wrong."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time

import huggingface_hub.utils
import pytest
import requests
from devlib.common import ROOT
from ovi_native.ovi_model.files import disk, download, model_folders, transfer
from ovi_native.ovi_model.files.catalogue import WeightFile
from support.hub_server import COMMIT, HubServer, use_folders

MB = 1_000_000
CONTENT = os.urandom(3 * MB + 17)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
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


@pytest.mark.usefixtures("client")
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


@pytest.mark.usefixtures("client")
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
    assert model_folders.partial_bytes(models / "vae" / "one.safetensors") == kept
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
sys.path[:0] = {[str(ROOT / "tools")]!r}
from devlib.pack import load_package
load_package()
import folder_paths
folder_paths.folder_names_and_paths["vae"] = ([{str(models / "vae")!r}], set())
from ovi_native.ovi_model.files import download
from ovi_native.ovi_model.files.catalogue import WeightFile
download.fetch([{FILE!r}], lambda step: print(step.done, flush=True), threading.Event(), {hub.url!r})
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while int(process.stdout.readline()) < MB:
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    kept = model_folders.partial_bytes(models / "vae" / "one.safetensors")
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
    kept = model_folders.partial_bytes(models / "vae" / "one.safetensors")
    assert 0 < kept <= MB + 64 * 1024
    assert "the connection broke" in sentence and f"{disk.human(kept)} of one.safetensors are kept" in sentence
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
    ({"cdn_status": 416}, ["answers with an error (416)"]),
    ({"cdn_status": 503}, ["answers with an error (503)"]),
    ({"cdn_status": 404, "endless": True}, ["(404)", "it may have moved"]),
    ({"cdn_status": 500, "endless": True}, ["answers with an error (500)"]),
    ({"status": 403, "endless": True}, ["refuses access", "(403)"]),
    ({"cdn_place": "", "endless": True}, ["more than 10 redirects"]),
    ({"cdn_place": "file:///etc/passwd"}, ["a redirect leads to 'file:///etc/passwd', which is no place on the web"]),
    ({"cdn_place": "ftp://a/x"}, ["which is no place on the web"]),
    ({"cdn_place": "http://a:99999999/x"}, ["which is no place on the web"]),
    ({"cdn_place": "http://[::1"}, ["which is no place on the web"]),
    ({"headers": {"Content-Encoding": "gzip"}}, ["came encoded (gzip)"]),
    ({"pages": 99}, ["does not give one.safetensors (a page (text/html)"]),
    ({"headers": {"Content-Type": "application/json; charset=utf-8"}}, ["a page (application/json)"]),
    ({"pages": 99, "headers": {"Content-Type": None}}, ["3000017 bytes were expected and the server sends 1020"]),
    ({"pages": 99, "headers": {"Content-Type": "binary/octet-stream", "Content-Length": None}}, ["an untold number"]),
    ({"headers": {"Content-Range": "bytes 5-3000016/3000017"}}, ["sends 'bytes 5-3000016/3000017'"]),
    ({"headers": {"Content-Range": "bytes 0-2999999/3000000"}}, ["bytes from 0 of 3000017 were asked for"]),
    ({"headers": {"Content-Range": "bytes 0-3000016/*"}}, ["sends 'bytes 0-3000016/*'"]),
    ({"headers": {"Content-Range": None}}, ["the server sends 'others'"]),
    ({"headers": {"Content-Length": "12"}}, ["bytes from 0 of 3000017 were asked for"]),
    ({"sent_status": 204}, ["answers with an error (204)"]),
], ids=str)
@pytest.mark.usefixtures("client")
def test_refusals_of_the_hub(hub, models, fault, parts):
    hub.add(FILE.repo, FILE.path, CONTENT, **fault)
    sentence = refused(hub)
    assert all(part in sentence for part in parts), sentence
    assert "one.safetensors" not in left_in(models / "vae")
    assert model_folders.partial_bytes(models / "vae" / "one.safetensors") == 0, "other bytes were kept"
    assert hub.wasted < 100 * MB, "the body of an error or redirect was read"


def test_https_is_not_left_for_http():
    headers = {"Authorization": "Bearer x", "Range": "bytes=0-"}
    with pytest.raises(transfer.Trouble, match="from https to http") as error:
        transfer.redirected("https://a/x", headers, "http://a/x")
    assert error.value.lasting
    assert transfer.redirected("https://a/x/y", headers, "../z?q=1 2") == ("https://a/z?q=1%202", headers)
    assert transfer.redirected("https://a/x", headers, "https://a.b/x") == ("https://a.b/x", {"Range": "bytes=0-"})


@pytest.mark.usefixtures("client")
def test_web_page_in_place_of_a_body_costs_nothing(hub, one):
    """Once at the start, once in the middle: the next attempts go on from the bytes that are the file's."""
    one.pages, one.cut_after = 1, [10**9, MB, 10**9]  # the page, a part, the rest
    assert fetch(hub)[0].read_bytes() == CONTENT
    one_more = model_folders.target(FILE)
    one_more.unlink()
    cancel = threading.Event()
    with pytest.raises(download.Cancelled):
        fetch(hub, report=lambda step: cancel.set() if step.done > MB else None, cancel=cancel)
    one.pages = 2
    assert fetch(hub)[0].read_bytes() == CONTENT


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [
    {"stall": "hub"}, {"stall": "cdn"}, {"drip": 1, "pause_s": 0.3}, {"drip": 1000, "pause_s": 60},
    {"cdn_status": 503}, {"cdn_place": ""},
], ids=str)
@pytest.mark.usefixtures("client")
def test_cancel_takes_effect_at_once(hub, models, fault, monkeypatch):
    """While a name is looked up, a connection made, a byte awaited or an attempt put off."""
    hub.add(FILE.repo, FILE.path, CONTENT, **fault)
    monkeypatch.setattr(download, "RETRY_PAUSE_S", 60)
    monkeypatch.setattr(transfer, "MOST_REDIRECTS", 10**9)
    cancel = threading.Event()
    ends = []

    def stop():
        ends.append(time.monotonic())
        cancel.set()

    threading.Timer(0.4, stop).start()
    with pytest.raises(download.Cancelled):
        fetch(hub, cancel=cancel)
    assert ends and time.monotonic() - ends[0] < 1
    assert "one.safetensors" not in left_in(models / "vae")


@pytest.mark.usefixtures("client")
def test_cancel_closes_the_connection(hub, one):
    """Not only when the next byte comes: the thread behind it waits for that in vain."""
    one.drip, one.pause_s = 1000, 0.01
    cancel, count, before = threading.Event(), [0], set(threading.enumerate())

    def stop(_):
        count[0] += 1
        if count[0] == 5:
            one.pause_s = 60
            cancel.set()

    with pytest.raises(download.Cancelled):
        fetch(hub, report=stop, cancel=cancel)
    deadline = time.monotonic() + 3
    while any(thread.name == "ovi-body" for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline, "the reading thread is still there"
        time.sleep(0.02)


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
