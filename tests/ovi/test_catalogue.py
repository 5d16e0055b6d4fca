"""The table of weight files: what a variant needs, what counts as present, where a download goes."""

import ast
import os
import re

import folder_paths
import pytest
from devlib.common import ROOT
from devlib.weights import TINY, WORLD
from ovi_native.ovi_model.files import catalogue as files
from ovi_native.ovi_model.files import model_folders
from ovi_native.ovi_model.ovi import catalogue
from ovi_native.ovi_model.ovi.needs import needs
from ovi_native.ovi_model.ovi.variants import VARIANTS
from support.hub_server import use_folders

MB = 1_000_000
FOLDERS = ("diffusion_models", "text_encoders", "vae")
PAIRS = [(variant, precision) for variant in VARIANTS for precision in catalogue.PRECISIONS]


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """ComfyUI's model folders, empty."""
    use_folders(tmp_path / "models", monkeypatch)
    return tmp_path / "models"


def put(models, name, size=MB):
    """A file that takes no room on the disk."""
    path = models / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def found(variant="960x960_5s", precision="bf16"):
    return {need.file.role: need.found for need in needs(variant, precision)}


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", catalogue.FILES.values(), ids=lambda file: file.id)
def test_files_stay_in_comfyui_folders(models, file):
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.repo)
    assert re.fullmatch(r"\w[\w.-]*\.(safetensors|pth?)", file.name) and ".." not in file.path
    assert file.folder in FOLDERS and file.role in catalogue.ROLES
    assert model_folders.target(file).parent == models / file.folder
    assert file.size > 100 * MB


@pytest.mark.parametrize("file", catalogue.FILES.values(), ids=lambda file: file.id)
def test_every_file_has_a_licence(file):
    sound = file.role in ("audio_vae", "vocoder")
    assert file.licence == ("CC-BY-NC-4.0" if sound else "Apache-2.0")
    assert catalogue.restricted([file]).startswith("For non-commercial use only (CC-BY-NC-4.0): ") == sound
    assert sound or catalogue.restricted([file]) == ""


@pytest.mark.parametrize("variant, precision", PAIRS)
def test_downloaded_files_are_then_present(models, variant, precision):
    listed = needs(variant, precision)
    assert [need.file.role for need in listed] == list(catalogue.ROLES)
    assert not any(need.present for need in listed)
    assert files.bytes_to_fetch(listed) == sum(need.file.size for need in listed) > 20 * 1000 * MB * 0.9
    for file in files.missing(listed):
        put(models, f"{file.folder}/{file.name}")
    again = needs(variant, precision)
    assert [need.found for need in again] == [(need.file.name,) for need in listed]
    assert files.missing(again) == [] and files.bytes_to_fetch(again) == 0
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


FOLDER = [  # as a list of models/vae and its like shows it: by the alphabet
    "Wan2_2-5B-Ovi_960x960_fp8_e4m3fn_scaled_KJ.safetensors", "ae.safetensors", "best_netG.pt", "clip_l.safetensors",
    "flux1-dev.safetensors", "mmaudio_vae_16k_bf16.safetensors", "mmaudio_vae_44k_fp16.safetensors",
    "model_960x960.safetensors", "model_960x960_10s.safetensors", "mmaudio_vocoder_bigvgan_best_netG_bf16.safetensors",
    "t5xxl_fp16.safetensors", "sub/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan2.2_vae.safetensors",
    "wan_2.1_vae.safetensors",
]
CHOICES = {"model": "model_960x960.safetensors", "text_encoder": "sub/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
           "video_vae": "wan2.2_vae.safetensors", "audio_vae": "mmaudio_vae_16k_bf16.safetensors",
           "vocoder": "best_netG.pt"}


def test_each_loader_begins_with_the_file_for_its_role():
    assert {role: catalogue.first_choice(role, FOLDER) for role in catalogue.ROLES} == CHOICES
    others = [name for name in FOLDER if name not in CHOICES.values()]
    assert {role: catalogue.first_choice(role, others) for role in catalogue.ROLES} == {
        "model": "Wan2_2-5B-Ovi_960x960_fp8_e4m3fn_scaled_KJ.safetensors", "text_encoder": None, "video_vae": None,
        "audio_vae": None, "vocoder": "mmaudio_vocoder_bigvgan_best_netG_bf16.safetensors"}


@pytest.mark.parametrize("files", [TINY, WORLD])
def test_of_the_tiny_models_too(files):
    listed = sorted(files.values())
    assert {role: catalogue.first_choice(role, listed) for role in files} == files


def test_pointers_and_dangling_links_do_not_count(models):
    put(models, "diffusion_models/model_960x960.safetensors", 134)  # as a Git LFS clone leaves it
    (models / "vae").mkdir()
    (models / "vae" / "v1-16.pth").symlink_to(models / "gone.pth")
    assert found()["model"] == () and found()["audio_vae"] == ()


def test_target_is_the_users_default_folder(tmp_path):
    file = catalogue.FILES["model_960x960_5s_bf16"]
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path / "big disk"), is_default=True)
    assert model_folders.target(file) == tmp_path / "big disk" / "model_960x960.safetensors"


def test_unknown_names_are_refused():
    for ids in (["model_960x960_5s_bf16", "x"], ["../vae"], ["https://huggingface.co/a/b"], [""]):
        with pytest.raises(ValueError, match=re.escape(f"Unknown file {ids[-1]!r}")):
            files.pick(catalogue.FILES, ids)
    assert files.pick(catalogue.FILES, ["vocoder", "vocoder"]) == [catalogue.FILES["vocoder"]]
    with pytest.raises(ValueError, match="Unknown Ovi variant '4k'"):
        needs("4k")
    with pytest.raises(ValueError, match="Unknown precision 'fp4': expected one of bf16, fp8"):
        needs("720x720_5s", "fp4")


def test_the_hub_library_is_imported_by_the_first_download_only():
    for path in (ROOT / "nodes" / "weights.py", ROOT / "server" / "downloads.py",
                 *(ROOT / "ovi_model" / name for name in (
                     "ovi/catalogue.py", "ovi/needs.py", "files/download.py", "files/model_folders.py"))):
        body = ast.parse(path.read_text("utf-8")).body
        top = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not {name for name in names if name and re.match("huggingface_hub|filelock|requests|httpx", name)}
