"""Loading the picture's VAE: what loads as with core's loader, and the sentence for what does not."""

from pathlib import Path

import comfy.ldm.wan.vae
import comfy.sd
import pytest
import torch
from comfy.ldm.wan.vae2_2 import WanVAE
from ovi_native.ovi_model.media import video_vae
from safetensors.torch import save_file
from tiny.audio import audio_vae
from tiny.text_encoder import text_encoder
from tiny.video_vae import video_vae as taehv_weights
from tiny.wan_vae import CONFIG, latents


def write(path: Path, tensors: dict) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def wan21() -> dict:
    return comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                                    temperal_downsample=[False, True, True], dropout=0.0).state_dict()


def changed(name: str, tensor: torch.Tensor | None) -> dict:
    """A TAEHV with one tensor more, other or less."""
    weights = taehv_weights(0) | ({} if tensor is None else {name: tensor})
    return {key: value for key, value in weights.items() if tensor is not None or key != name}


def test_a_file_loads_as_with_cores_loader(tmp_path):
    path = write(tmp_path / "taew2_2.safetensors", taehv_weights(0))
    vae = video_vae.load_video_vae(path)
    truth = comfy.sd.VAE(sd=taehv_weights(0))
    assert torch.equal(vae.decode(latents(2)), truth.decode(latents(2)))
    clone = vae.patcher.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert clone.model is not vae.patcher.model


def test_the_published_network_is_known_by_its_names(monkeypatch):
    """At full size, without its numbers: 196 tensors on the meta device."""
    with torch.device("meta"):
        monkeypatch.setattr(video_vae, "load_weights", lambda _: (WanVAE(**CONFIG).state_dict(), {}))
        vae = video_vae.load_video_vae("wan2.2_vae.safetensors")
    assert isinstance(vae.first_stage_model, WanVAE) and vae.latent_channels == 48


WRONG = {
    "Wan 2.1": (wan21, "is the Wan 2.1 video VAE, not the Wan 2.2 video VAE with 48 channels"),
    "of sound": (lambda: audio_vae(0), "is an MMAudio 16 kHz VAE without its vocoder, not the Wan 2.2 video VAE"),
    "text encoder": (lambda: text_encoder(0), "is a UMT5 text encoder"),
    "another TAEHV": (lambda: changed("decoder.1.weight", torch.zeros(256, 16, 3, 3)), "is a tiny video VAE"),
    "another width": (lambda: WanVAE(dim=8, dec_dim=8, **CONFIG).state_dict(),
                      "has the tensors of a Wan 2.2 video VAE in other sizes"),
    "incomplete": (lambda: changed("decoder.22.weight", None),
                   "is damaged or incomplete: it lacks 1 of .*decoder.22.weight"),
    "anything": (lambda: {"x": torch.zeros(2), "y": torch.zeros(2)}, "is 2 tensors this pack does not know"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_said_in_a_sentence(tmp_path, kind):
    make, sentence = WRONG[kind]
    with pytest.raises(RuntimeError, match=rf"^some_file\.safetensors {sentence}") as error:
        video_vae.load_video_vae(write(tmp_path / "some_file.safetensors", make()))
    assert "\n" not in str(error.value)
    assert "Choose wan2.2_vae.safetensors" in str(error.value) or "Download it again" in str(error.value)
