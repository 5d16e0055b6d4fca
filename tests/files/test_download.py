"""Downloads from a local Hub: redirects, resume, and everything that goes wrong."""

import re
import subprocess
import sys
import threading
import time

import pytest
from devlib.common import ROOT
from ovi_native.ovi_model.files import disk, download, model_folders, transfer
from ovi_native.ovi_model.files.catalogue import WeightFile
from support.downloads import CONTENT, FILE, MB, fetch, left_in, refused
from support.hub_server import COMMIT

pytestmark = pytest.mark.usefixtures("models")

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
