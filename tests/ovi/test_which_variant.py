"""Which of the three models a file is: one answer of the loader, of the list behind Ovi Weights, and of the commands.

Every name under which Ovi's weights were released or circulate, and others that people give such files.
"""

from pathlib import Path

import pytest
import torch
from ovi_native.ovi_model.files.safetensors_file import safetensors_chunks
from ovi_native.ovi_model.ovi import catalogue, checkpoint
from ovi_native.ovi_model.ovi.needs import needs
from ovi_native.ovi_model.ovi.variants import VARIANTS
from support.hub_server import use_folders
from tiny.checkpoint import draw_weights
from tiny.sizes import Sizes

PAIRS = {
    "720x720_5s": (
        "Wan_2_2_Ovi_video_model_bf16.safetensors", "Wan_2_1_Ovi_video_model_bf16.safetensors",
        "WanVideo/Ovi/Wan_2_1_Ovi_video_model_bf16.safetensors", "Wan2_2_Ovi_Video_fp8_e4m3fn_scaled_KJ.safetensors",
        "wan2.2_ovi_video_10B_bf16.safetensors", "wan2.2_ovi_video_10B_quanto_bf16_int8.safetensors",
        "ovi_720x720_video.safetensors", "ovi_video_fp8.safetensors",
    ),
    "960x960_5s": (
        "wan2.2_ovi1_1_video_10B_bf16.safetensors", "wan2.2_ovi1_1_video_10B_quanto_bf16_int8.safetensors",
        "ovi_960x960_video.safetensors", "model_960x960_video.safetensors",
    ),
    "960x960_10s": ("wan2.2_ovi1_1_10s_video_10B_bf16.safetensors", "model_960x960_10s_video.safetensors"),
}
JOINT = {
    "720x720_5s": (
        "model.safetensors", "sub/model.safetensors", "model_fp8_e4m3fn.safetensors", "ovi_720x720_5s_fp8.safetensors",
        "Ovi-720.pt", "model_720x720_int8.safetensors", "ovi_v1.0_720x720_5_sec.safetensors",
    ),
    "960x960_5s": (
        "model_960x960.safetensors", "sub/MODEL_960x960.safetensors", "model_960x960_fp8_scaled.safetensors",
        "Wan2_2-5B-Ovi_960x960_fp8_e4m3fn_scaled_KJ.safetensors", "ovi_960x960_5s_int8.safetensors",
        "ovi_960_fp8.safetensors", "ovi_v1.1.safetensors", "Ovi-1.1-bf16.pth", "ovi1_1_5s.ckpt",
        "ovi_v1.1_960x960_5_sec.safetensors", "ovi_v1.1_960x960_steps110s_x.sft", "ovi_960x960_v10_s1.safetensors",
    ),
    "960x960_10s": (
        "model_960x960_10s.safetensors", "Wan2_2-5B-Ovi_960x960_10s_fp8_e4m3fn_scaled_KJ.safetensors",
        "ovi_v1.1_960x960_10_sec.safetensors", "my_ovi_10s_960x960.safetensors", "ovi_960x960_10s_nvfp4.safetensors",
        "ovi-10sec.safetensors", "ovi_960x960_10s\u200b.safetensors", "ovi_10s\udcff.pth",
        "ovi 960x960 10 seconds.safetensors", "Ovi-1.1-10s.pt", "model_960x960_10s_int8.sft",
    ),
}
NOT_TOLD = ("dreamid_omni.safetensors", "model_ema.pt", "Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ.safetensors",
            "ovi.safetensors", "my_model.safetensors")
OTHERS = (
    "ovi_tiny_random.safetensors", "model_960x960_lora.safetensors", "ovi_960x960_vae.safetensors",
    "model_960x960.safetensors.part", "movie_960x960.safetensors", "ltx_720.safetensors", "hunyuan_10s.safetensors",
    "OviDMD_960x960.safetensors", "ovi_960x960_00001_.latent.safetensors", "umt5_ovi_720.safetensors",
    "ovi_960x960.txt", "model.pth", "ovi_960x960.safetensors\n",
)
TENSORS = draw_weights(Sizes(blocks=1))


def loaded_as(*names, metadata=None):
    """The variant that the loader finds for a joint file or for two halves."""
    def read(path):
        name = Path(path).name
        tower = next((tower for tower in ("video", "audio") if len(names) > 1 and tower in name.lower()), "")
        return checkpoint.make_part(name, {key: w for key, w in TENSORS.items() if key.startswith(f"{tower}_model.")
                                           or not tower}, metadata or {})

    return checkpoint.read_checkpoint(*names[:2], read=read)[1].variant


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    use_folders(tmp_path / "models", monkeypatch)
    return tmp_path / "models" / "diffusion_models"


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(1_000_000)


def listed() -> dict[str, tuple[str, ...]]:
    """What Ovi Weights counts as the model of each variant."""
    found = {variant: next(need.found for need in needs(variant) if need.file.role == "model") for variant in VARIANTS}
    return {variant: tuple(name.replace("\\", "/") for name in names) for variant, names in found.items() if names}


@pytest.mark.parametrize("variant, name", [(variant, name) for variant, names in JOINT.items() for name in names])
def test_joint_files(folder, variant, name):
    assert loaded_as(name) == variant
    put(folder, name)
    assert listed() == {variant: (name,)}
    assert catalogue.best_model([name]) == (name,)


@pytest.mark.parametrize("variant, video", [(variant, name) for variant, names in PAIRS.items() for name in names])
def test_pairs_of_towers(folder, variant, video):
    audio = video.replace("video", "audio").replace("Video_", "Audio_")
    assert audio != video and loaded_as(video, audio) == variant
    for name in (video, audio):
        put(folder, name)
        assert (listed() == {}) == (name == video), "half a model counts"
    assert listed() == {variant: (video, audio)}
    assert catalogue.best_model([audio, video]) == (video, audio)


def test_halves_of_one_name_and_one_folder_belong_together():
    names = ["videos/ovi_audio_bf16.safetensors", "videos/ovi_audio_fp8.safetensors",
             "videos/ovi_video_fp8.safetensors", "x/ovi_audio_fp8.safetensors"]
    assert catalogue.model_files("720x720_5s", names) == (names[2], names[1])
    assert catalogue.model_files("720x720_5s", names[::-1]) == (names[2], names[1])


@pytest.mark.parametrize("name", NOT_TOLD)
def test_names_that_tell_nothing(folder, name):
    assert loaded_as(name) is None
    put(folder, name)
    assert listed() == {} and catalogue.best_model([name]) == ()


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_no_model(folder, name):
    put(folder, name)
    assert listed() == {} and catalogue.best_model([name]) == ()


def write(path, metadata, size=1_000_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(safetensors_chunks({"w": torch.zeros(size, dtype=torch.uint8)}, metadata)))


def test_metadata_wins_over_the_name(folder):
    told = {"ovi_variant": "960x960_10s"}
    write(folder / "model.safetensors", told)
    assert listed() == {"960x960_10s": ("model.safetensors",)}
    assert loaded_as("model.safetensors", metadata=told) == "960x960_10s"
    write(folder / "model.safetensors", {"ovi_variant": "2000x2000_60s"})
    assert listed() == {"720x720_5s": ("model.safetensors",)}
    assert loaded_as("model.safetensors", metadata={"ovi_variant": "2000x2000_60s"}) == "720x720_5s"
    assert catalogue.variant_of("model.safetensors", told) == "960x960_10s"


def test_metadata_makes_any_name_a_model(folder):
    write(folder / "mine.safetensors", {"ovi_variant": "960x960_5s"})
    write(folder / "mine_lora.safetensors", {"ovi_variant": "720x720_5s"})
    write(folder / "theirs.safetensors", {})
    assert listed() == {"960x960_5s": ("mine.safetensors",)}


def test_metadata_joins_two_halves(folder):
    names = "a_video.safetensors", "b_audio.safetensors"
    for name in names:
        assert listed() == {}
        write(folder / name, {"ovi_variant": "960x960_10s"})
    assert listed() == {"960x960_10s": names}


def test_a_header_that_cannot_be_read_tells_nothing(folder):
    write(folder / "model_960x960.safetensors", {"ovi_variant": "960x960_10s"})
    content = (folder / "model_960x960.safetensors").read_bytes()
    for damaged in (content[:-1], b"\xff" * len(content), (1 << 62).to_bytes(8, "little") + content[8:]):
        (folder / "model_960x960.safetensors").write_bytes(damaged)
        assert listed() == {"960x960_5s": ("model_960x960.safetensors",)}


def test_the_released_file_goes_before_others_and_a_whole_before_halves():
    names = ["ovi_960x960_fp8.safetensors", "ovi_960x960_video.safetensors", "ovi_960x960_audio.safetensors",
             "x/model_960x960.safetensors"]
    assert catalogue.model_files("960x960_5s", names) == ("x/model_960x960.safetensors",)
    assert catalogue.model_files("960x960_5s", names[:3]) == (names[0],)
    others = ["wan2.2_ovi_audio_10B_bf16.safetensors", "wan2.2_ovi_video_10B_quanto_bf16_int8.safetensors",
              "wan2.2_ovi_audio_10B_quanto_bf16_int8.safetensors"]
    assert catalogue.model_files("720x720_5s", others) == (others[1], others[2])
    assert catalogue.model_files("720x720_5s", others[:2]) == (others[1], others[0])
