"""Files that are refused, and the sentence each gets; and names in workflows that point outside ComfyUI's folders."""

import os
import pickle
import re
import shutil
from pathlib import Path

import folder_paths
import pytest
import torch
from ovi_native.nodes.loaders import (
    AUTO_SECOND,
    AUTO_TOKENIZER,
    OviAudioVAELoader,
    OviModelLoader,
    OviTextEncoderLoader,
    OviVAELoader,
)
from ovi_native.ovi_model.ovi import checkpoint
from support.formats import BF16, KIJAI, audio_half, cast, original, prefixed, video_half, write
from tiny.audio import audio_vae
from tiny.checkpoint import draw_weights
from tiny.models import plain_wan_weights
from tiny.sizes import Sizes, core_layout
from tiny.text_encoder import text_encoder, tokenizer_model
from tiny.video_vae import video_vae


def refused(path: str, sentence: str, second: str | None = None) -> None:
    with pytest.raises(RuntimeError, match=sentence) as error:
        checkpoint.load_model(str(path), None, second)
    assert re.search(r"[Dd]ownload|[Cc]hoose|set the second file|needs the direct link", str(error.value)), error.value
    assert Path(path).name in str(error.value)


# --- files that are no weight file ------------------------------------------------------------------------------------

@pytest.fixture
def whole(tmp_path) -> Path:
    return Path(write(tmp_path / "model.safetensors", cast(original(), BF16)))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated(tmp_path, suffix, share):
    path = Path(write(tmp_path / f"model{suffix}", cast(original(), BF16)))
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    refused(path, "damaged or only partly downloaded" if suffix == ".safetensors" else "cannot be read as")


def test_longer_than_it_says(whole):
    """Two downloads appended, or a file written over a longer one."""
    whole.write_bytes(whole.read_bytes() + bytes(4096))
    refused(whole, "damaged or only partly downloaded")


@pytest.mark.parametrize(("start", "content"), [(0, b"\xff" * 8), (8, bytes(64)), (100, b'"shape":[-1,'), (9, b"\xff")])
def test_corrupted_header(whole, start, content):
    data = bytearray(whole.read_bytes())
    data[start:start + len(content)] = content
    whole.write_bytes(data)
    refused(whole, "damaged or only partly downloaded")


@pytest.mark.parametrize(("content", "sentence"), [
    (b"<!DOCTYPE html>\n<html><head><title>Hugging Face</title>", "is a web page, not a weight file.*direct link"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 23300000000\n",
     "is a Git LFS placeholder of 76 bytes, not the weights.*git lfs pull"),
    (b'{"error": "Unauthorized"}', "cannot be read as a weight file"),
    (b"", "cannot be read as a weight file"),
])
def test_no_weights_at_all(tmp_path, content, sentence):
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path / "model.safetensors", sentence)


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write_file", [torch.save, lambda x, path: Path(path).write_bytes(pickle.dumps(x))])
@pytest.mark.parametrize("place", [lambda p: {"a": p}, lambda p: {**original(), "extra": p}, lambda p: p])
def test_pickle_with_code(tmp_path, write_file, place):
    write_file(place(Payload(tmp_path / "executed")), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "Files that carry code are never opened; get the safetensors version")
    assert not (tmp_path / "executed").exists()


# --- weight files of something else -----------------------------------------------------------------------------------

def ltx(prefix: str):
    names = ("patchify_proj.weight", "audio_patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight",
             "transformer_blocks.0.audio_attn1.to_q.weight")
    return {f"{prefix}{name}": torch.zeros(4, 4) for name in names}


def lora():
    return {f"diffusion_model.blocks.{i}.self_attn.q.lora_{way}.weight": torch.zeros(4, 4) for i in range(2)
            for way in ("down", "up")}


OTHERS = {
    "Wan2.2-5B": (lambda: core_layout(plain_wan_weights()), "a Wan video model with 48 input channels that was never "
                  "joined with Ovi's audio tower"),
    "Wan2.2-5B wrapped": (lambda: prefixed(core_layout(plain_wan_weights()), "model.diffusion_model."),
                          "is a Wan video model with 48 input channels that was never joined"),
    "LoRA": (lora, "it holds a LoRA"),
    "LTX": (lambda: ltx(""), "it holds an LTX video model"),
    "LTX wrapped": (lambda: ltx("model.diffusion_model."), "it holds an LTX video model"),
    "UMT5": (lambda: text_encoder(0), "it holds a UMT5 text encoder"),
    "audio VAE": (lambda: audio_vae(0), "it holds an MMAudio 16 kHz VAE without its vocoder"),
    "video VAE": (lambda: video_vae(0), "it holds a tiny video VAE"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model(tmp_path, kind):
    make, sentence = OTHERS[kind]
    refused(write(tmp_path / "model.safetensors", make()), f"{sentence}.*Choose an Ovi checkpoint")


# --- incomplete models and wrong pairs --------------------------------------------------------------------------------

def test_missing_tensors_are_named_and_counted(tmp_path):
    weights = original()
    for name in ("video_model.blocks.1.ffn.0.bias", "audio_model.blocks.0.norm3.weight"):
        weights = {key: tensor for key, tensor in weights.items() if key != name}
    path = write(tmp_path / "model.safetensors", weights)
    refused(path, r"lacks 2 of 169 tensors \((blocks\.1\.ffn\.0\.bias|audio_model\.blocks\.0\.norm3\.weight), ")


def test_a_half_alone(tmp_path):
    video = write(tmp_path / "half.safetensors", video_half(original()))
    refused(video, "only Ovi's video tower. Choose the file with the other tower as second file")
    audio = write(tmp_path / "other.safetensors", audio_half(original()))
    refused(audio, "only Ovi's audio tower. Choose the file with the other tower as second file")


@pytest.mark.parametrize("half", [video_half, audio_half])
def test_two_halves_of_one_kind(tmp_path, half):
    one, two = (write(tmp_path / name, half(original())) for name in ("one.safetensors", "two.safetensors"))
    tower = half.__name__.removesuffix("_half")
    refused(one, f"one.safetensors holds only Ovi's {tower} tower and two.safetensors holds only Ovi's {tower} tower: "
                 "choose one file with each", two)


def test_a_partner_that_is_the_same_half(tmp_path):
    """A file renamed to look like its partner."""
    video, _ = (write(tmp_path / name, video_half(original())) for name in KIJAI)
    refused(video, "video_model_bf16.safetensors holds only Ovi's video tower and .*audio_model_bf16.* only Ovi's v")


@pytest.mark.parametrize(("sizes", "sentence"), [
    (Sizes(blocks=3), "its video tower has 2 blocks, its audio tower 3"),
    (Sizes(blocks=2, heads=1), "its video tower is 256 wide, its audio tower 128"),
])
def test_halves_of_different_size(tmp_path, sizes, sentence):
    video = write(tmp_path / "a_video.safetensors", video_half(original()))
    write(tmp_path / "a_audio.safetensors", audio_half(draw_weights(sizes)))
    refused(video, f"{sentence}")


def test_a_joint_file_with_a_second(tmp_path, whole):
    audio = write(tmp_path / "audio.safetensors", audio_half(original()))
    refused(whole, "holds both towers already; set the second file to", audio)
    video = write(tmp_path / "clip.safetensors", video_half(original()))
    with pytest.raises(RuntimeError, match=r"clip.* only Ovi's video tower and model\.safetensors holds both towers"):
        checkpoint.load_model(video, None, str(whole))


# --- names in workflows -----------------------------------------------------------------------------------------------

@pytest.fixture
def folders(tiny_models, tmp_path, monkeypatch) -> Path:
    """Folders of models that hold nothing, beside a folder with files that would load."""
    shutil.copytree(tiny_models, tmp_path / "outside", copy_function=os.link)
    (tmp_path / "outside" / "tokenizer.json").write_bytes(b"{}")
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (tmp_path / "models" / kind).mkdir(parents=True)
        endings = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / "models" / kind)], endings))
        folder_paths.filename_list_cache.pop(kind, None)
    yield tmp_path
    for kind in ("diffusion_models", "text_encoders", "vae"):
        folder_paths.filename_list_cache.pop(kind, None)


OUTSIDE = {
    "model_name": (OviModelLoader, "diffusion_models/ovi_tiny_random.safetensors",
                   lambda name: (name, "default", AUTO_SECOND)),
    "second_file": (OviModelLoader, "diffusion_models/ovi_tiny_random.safetensors",
                    lambda name: ("inside.safetensors", "default", name)),
    "text_encoder_name": (OviTextEncoderLoader, "text_encoders/ovi_tiny_random_umt5.safetensors",
                          lambda name: (name, AUTO_TOKENIZER)),
    "tokenizer_name": (OviTextEncoderLoader, "tokenizer.json", lambda name: ("inside.safetensors", name)),
    "vae_name": (OviAudioVAELoader, "vae/ovi_tiny_random_mmaudio_vae.safetensors",
                 lambda name: (name, "inside.safetensors")),
    "video_vae_name": (OviVAELoader, "vae/ovi_tiny_random_taew2_2.safetensors",
                       lambda name: (name, "inside.safetensors", "inside.safetensors")),
    "vocoder_name": (OviAudioVAELoader, "vae/ovi_tiny_random_mmaudio_vocoder.safetensors",
                     lambda name: ("inside.safetensors", name)),
}


@pytest.mark.parametrize("way", ["../../outside/{}", "x/../../../outside/{}", "{root}/outside/{}",
                                 "..\\..\\outside\\{}", "//{root}/outside/{}", "./../../outside/{}", "\0{}", ""])
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_do_not_leave_the_folders(folders, name, way):
    """The values come as they are in the workflow, past the dropdown's own check."""
    node, file, arguments = OUTSIDE[name]
    assert (folders / "outside" / file).is_file()
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (folders / "models" / kind / "inside.safetensors").touch()
    with pytest.raises(RuntimeError) as error:
        node.execute(*arguments(way.format(file, root=folders)))
    assert "was not found in models/" in str(error.value)


def test_links_are_followed_only_where_the_user_put_them(folders):
    """A link inside the folder is the user's own way to keep files elsewhere; a name cannot go up through one."""
    (folders / "models" / "diffusion_models" / "linked").symlink_to(folders / "outside" / "diffusion_models")
    assert OviModelLoader.execute("linked/ovi_tiny_random.safetensors", "default").result[1]
    for name in ("linked/../ovi_tiny_random.safetensors", "linked/../../diffusion_models/ovi_tiny_random.safetensors"):
        with pytest.raises(RuntimeError, match="was not found in models/diffusion_models"):
            OviModelLoader.execute(name, "default")


def test_automatic_lookups_stay_beside_the_file(folders):
    """The other half and the tokenizer are looked for beside the chosen file or in ComfyUI's folders."""
    names = ("a_video.safetensors", "a_audio.safetensors")
    write(folders / "models" / "diffusion_models" / names[0], video_half(original()))
    write(folders / "models" / names[1], audio_half(original()))
    with pytest.raises(RuntimeError, match="only Ovi's video tower"):
        OviModelLoader.execute(names[0], "default")
    weights = {name: t for name, t in text_encoder(0).items() if name != "spiece_model"}
    write(folders / "models" / "text_encoders" / "umt5.safetensors", weights)
    (folders / "models" / "spiece.model").write_bytes(tokenizer_model())
    with pytest.raises(RuntimeError, match="needs its tokenizer"):
        OviTextEncoderLoader.execute("umt5.safetensors", AUTO_TOKENIZER)
