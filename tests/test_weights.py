"""The table of weight files, and downloads from a local Hub: redirects, resume, and everything that goes wrong."""

import ast
import os
import re
import socket
import subprocess
import sys
import threading
import time

import folder_paths
import pytest
from devlib.common import ROOT
from hub_server import COMMIT, HubServer
from ovi_native.ovi_model import download, weights
from ovi_native.ovi_model.variants import VARIANTS
from ovi_native.ovi_model.weights import WeightFile

MB = 1_000_000
FOLDERS = ("diffusion_models", "text_encoders", "vae")
PAIRS = [(variant, precision) for variant in VARIANTS for precision in weights.PRECISIONS]
CONTENT = os.urandom(3 * MB + 17)
FILE = WeightFile("one", "video_vae", "org/repo", "split_files/vae/one.safetensors", "vae", len(CONTENT))


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """ComfyUI's folders, empty, in the order that core gives them."""
    root = tmp_path / "models"
    monkeypatch.setattr(folder_paths, "models_dir", str(root))
    places = {"diffusion_models": ("unet", "diffusion_models"), "text_encoders": ("text_encoders", "clip"),
              "vae": ("vae",)}
    for folder, names in places.items():
        entry = ([str(root / name) for name in names], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, entry)
    return root


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


def put(models, name, size=MB):
    """A file that takes no room on the disk."""
    path = models / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def found(variant="960x960_5s", precision="bf16"):
    return {need.file.role: need.found for need in weights.needs(variant, precision)}


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


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", weights.FILES.values(), ids=lambda file: file.id)
def test_files_stay_in_comfyui_folders(models, file):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.repo)
    assert re.fullmatch(r"\w[\w.-]*\.(safetensors|pth?)", file.name) and ".." not in file.path
    assert file.folder in FOLDERS and file.role in weights.ROLES
    assert weights.target(file).parent == models / file.folder
    assert file.size > 100 * MB


@pytest.mark.parametrize("variant, precision", PAIRS)
def test_downloaded_files_are_then_present(models, variant, precision):
    listed = weights.needs(variant, precision)
    assert [need.file.role for need in listed] == list(weights.ROLES)
    assert not any(need.present for need in listed)
    assert weights.bytes_to_fetch(listed) == sum(need.file.size for need in listed) > 20 * 1000 * MB * 0.9
    for file in weights.missing(listed):
        put(models, f"{file.folder}/{file.name}")
    again = weights.needs(variant, precision)
    assert [need.found for need in again] == [(need.file.name,) for need in listed]
    assert weights.missing(again) == [] and weights.bytes_to_fetch(again) == 0
    others = [found(other)["model"] for other in VARIANTS if other != variant]
    assert others == [(), ()], "the model of one variant passes for another's"


@pytest.mark.parametrize("variant, names", [
    ("720x720_5s", ["model.safetensors"]),
    ("720x720_5s", ["model_fp8_e4m3fn.safetensors"]),
    ("720x720_5s", ["Wan_2_2_Ovi_video_model_bf16.safetensors", "Wan_2_2_Ovi_audio_model_bf16.safetensors"]),
    ("720x720_5s", ["WanVideo/Ovi/Wan_2_1_Ovi_video_model_bf16.safetensors",
                    "WanVideo/Ovi/Wan_2_1_Ovi_audio_model_bf16.safetensors"]),
    ("720x720_5s", ["Wan2_2_Ovi_Video_fp8_e4m3fn_scaled_KJ.safetensors",
                    "Wan2_2_Ovi_Audio_fp8_e4m3fn_scaled_KJ.safetensors"]),
    ("720x720_5s", ["wan2.2_ovi_video_10B_quanto_bf16_int8.safetensors",
                    "wan2.2_ovi_audio_10B_quanto_bf16_int8.safetensors"]),
    ("720x720_5s", ["ovi_720x720_5s_fp8.safetensors"]),
    ("960x960_5s", ["sub/MODEL_960x960.safetensors"]),
    ("960x960_5s", ["Wan2_2-5B-Ovi_960x960_fp8_e4m3fn_scaled_KJ.safetensors"]),
    ("960x960_5s", ["wan2.2_ovi1_1_video_10B_bf16.safetensors", "wan2.2_ovi1_1_audio_10B_bf16.safetensors"]),
    ("960x960_5s", ["ovi_960x960_5s_int8.safetensors"]),
    ("960x960_10s", ["model_960x960_10s.safetensors"]),
    ("960x960_10s", ["Wan2_2-5B-Ovi_960x960_10s_fp8_e4m3fn_scaled_KJ.safetensors"]),
], ids=lambda value: value if isinstance(value, str) else value[0])
def test_models_in_circulation_are_recognised(models, variant, names):
    for name in names:
        assert found(variant)["model"] == (), "half a model counts"
        put(models, f"diffusion_models/{name}")
    assert {v: tuple(map(os.path.normpath, found(v)["model"])) for v in VARIANTS} == {
        v: tuple(map(os.path.normpath, names)) if v == variant else () for v in VARIANTS}


@pytest.mark.parametrize("role, name", [
    ("text_encoder", "text_encoders/umt5_xxl_fp16.safetensors"),
    ("text_encoder", "clip/umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    ("video_vae", "vae/Wan2_2_VAE_bf16.safetensors"), ("video_vae", "vae/Wan2.2_VAE.pth"),
    ("audio_vae", "vae/v1-16.pth"), ("audio_vae", "vae/mmaudio_vae_16k_fp32.safetensors"),
    ("vocoder", "vae/best_netG.pt"), ("vocoder", "vae/mmaudio_vocoder_bigvgan_best_netG_fp32.safetensors"),
])
def test_companions_in_circulation_are_recognised(models, role, name):
    put(models, name)
    assert {key: value for key, value in found().items() if value} == {role: (name.split("/")[1],)}


@pytest.mark.parametrize("name", [
    "diffusion_models/ovi_tiny_random.safetensors", "diffusion_models/model_960x960_lora.safetensors",
    "diffusion_models/Wan_2_2_Ovi_video_model_bf16.safetensors", "diffusion_models/dreamid_omni.safetensors",
    "diffusion_models/model_960x960.safetensors.part", "text_encoders/t5xxl_fp16.safetensors",
    "text_encoders/models_t5_umt5-xxl-enc-bf16.pth", "vae/wan_2.1_vae.safetensors",
    "vae/mmaudio_vae_44k_fp16.safetensors", "vae/model_960x960.safetensors", "loras/v1-16.pth",
])
def test_similar_files_are_not_mistaken(models, name):
    put(models, name)
    assert not any(value for variant in VARIANTS for value in found(variant).values())


def test_wan_native_text_encoder_needs_its_tokenizer(models):
    put(models, "text_encoders/models_t5_umt5-xxl-enc-bf16.pth")
    put(models, "text_encoders/google/umt5-xxl/tokenizer.json")
    assert found()["text_encoder"] == ("models_t5_umt5-xxl-enc-bf16.pth",
                                       os.path.join("google", "umt5-xxl", "tokenizer.json"))


def test_pointers_and_dangling_links_do_not_count(models):
    put(models, "diffusion_models/model_960x960.safetensors", 134)  # as a Git LFS clone leaves it
    (models / "vae").mkdir()
    (models / "vae" / "v1-16.pth").symlink_to(models / "gone.pth")
    assert found()["model"] == () and found()["audio_vae"] == ()


def test_target_is_the_users_default_folder(tmp_path):
    file = weights.FILES["model_960x960_5s_bf16"]
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path / "big disk"), is_default=True)
    assert weights.target(file) == tmp_path / "big disk" / "model_960x960.safetensors"


def test_unknown_names_are_refused():
    for ids in (["model_960x960_5s_bf16", "x"], ["../vae"], ["https://huggingface.co/a/b"], [""]):
        with pytest.raises(ValueError, match=re.escape(f"Unknown file {ids[-1]!r}")):
            weights.get_files(ids)
    assert weights.get_files(["vocoder", "vocoder"]) == [weights.FILES["vocoder"]]
    with pytest.raises(ValueError, match="Unknown Ovi variant '4k'"):
        weights.needs("4k")
    with pytest.raises(ValueError, match="Unknown precision 'fp4': expected one of bf16, fp8"):
        weights.needs("720x720_5s", "fp4")


def test_sizes_are_readable():
    assert [weights.human(n) for n in (0, 999, 1500, 326_154_893, 1_409_400_960, 23_300_000_000)] == [
        "0 bytes", "999 bytes", "1.5 kB", "326 MB", "1.4 GB", "23.3 GB"]


def test_the_hub_library_is_imported_by_the_first_download_only():
    for path in (ROOT / "nodes" / "weights.py", ROOT / "nodes" / "weights_routes.py",
                 *(ROOT / "ovi_model" / name for name in ("weights.py", "download.py"))):
        body = ast.parse(path.read_text("utf-8")).body
        top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not {name for name in names if name and re.match("huggingface_hub|filelock|requests|httpx", name)}


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
