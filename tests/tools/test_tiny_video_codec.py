"""The tiny Ovi's video codec: narrow and full networks are the same, core loads it, and it means the linear latents."""

import comfy.sd
import numpy as np
import pytest
import torch
from comfy.taesd.taehv import TAEHV
from ovi_native.ovi_model.media.video_vae import decode_chunks
from safetensors.torch import load_file
from tiny.video_vae import video_vae
from tiny_ovi import decoder_start, encoder_start, video_codec
from tiny_ovi.files import SHIPPED
from tiny_ovi.latents import Basis, Codec
from tiny_ovi.taehv import Narrow, Widths
from tiny_ovi.video_codec import WAN, draw_clips
from tiny_ovi.zero_channels import cut, expand, pack

SMALL = Widths(12, (9, 10, 11), (8, 7, 12), (1, 5, 2, 3, 4, 6, 1, 2, 3), (20, 9, 10, 6), (13, 7, 5),
               (5, 4, 3, 6, 2, 1, 4, 4, 4))
NARROW = {"default": Widths(), "small": SMALL}


@pytest.fixture(params=NARROW)
def narrow(request):
    """A network whose every parameter is random, biases too."""
    torch.manual_seed(3)
    network = Narrow(NARROW[request.param]).requires_grad_(False)
    for name, value in network.named_parameters():
        if name.endswith("bias"):
            value.normal_(std=0.1)
    return network


@pytest.fixture(scope="module")
def codec():
    """Latents that stand for coarse parts of the world's pictures; cheap, unlike principal components."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(48, 4, 4, 1, 4, 1, 3, generator=random).expand(-1, -1, -1, 4, -1, 4, -1)
    components = coarse.reshape(48, -1).T / 150
    return Codec(Basis(torch.full((3072,), 0.7), components, torch.linalg.pinv(components)), None)


def clips(codec, size=64, frames=9, count=3, seed=5):
    return draw_clips(np.random.default_rng(seed), codec, size, frames, count)


def test_core_computes_the_same_with_the_expanded_weights(narrow):
    full = TAEHV(48, parallel=True)
    full.load_state_dict(expand(narrow.state_dict()))
    frames, latents = torch.rand(2, 3, 6, 64, 32), torch.randn(2, 48, 3, 4, 2)
    for ours, theirs in ((narrow.encode(frames), full.encode(frames)), (narrow.decode(latents), full.decode(latents))):
        assert ours.shape == theirs.shape and ours.std() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_pack_undoes_expand(narrow):
    small = narrow.state_dict()
    packed = pack(expand(small))
    assert {name: value.shape for name, value in packed.items()} == {name: value.shape for name, value in small.items()}
    assert all(torch.equal(packed[name], small[name]) for name in small)


def test_pack_loses_nothing_of_a_full_network():
    full = video_vae(0)
    full["decoder.3.conv.0.weight"][:, 200:256] = 0  # a hole within is kept, one at the end is cut
    full["encoder.4.conv.2.weight"][:, 40:] = 0
    full["encoder.9.conv.2.weight"].zero_()
    packed = pack(full)
    assert packed["encoder.4.conv.2.weight"].shape == (64, 40, 3, 3)
    assert packed["encoder.9.conv.2.weight"].shape == (1, 1, 1, 1)
    expanded = expand(packed)
    assert all(torch.equal(expanded[name], full[name]) for name in full)


def test_core_loads_the_file_and_decodes_as_chunks_do(narrow):
    vae = comfy.sd.VAE(sd={name: value.half() for name, value in expand(narrow.state_dict()).items()})
    assert isinstance(vae.first_stage_model, TAEHV) and vae.latent_channels == 48
    latents = torch.randn(1, 48, 3, 4, 2)
    whole = vae.decode(latents)[0]
    assert whole.shape == (9, 64, 32, 3)
    torch.testing.assert_close(torch.cat(list(decode_chunks(vae, latents))).cpu(), whole.cpu())


def test_expand_refuses_what_it_cannot_place():
    small = Narrow(SMALL).state_dict()
    missing = {name: value for name, value in small.items() if name != "decoder.22.bias"}
    with pytest.raises(ValueError, match=r"decoder\.22\.bias is missing or unknown"):
        expand(missing)
    with pytest.raises(ValueError, match=r"encoder.0.bias has the shape \[65\]"):
        expand(small | {"encoder.0.bias": torch.zeros(65)})
    with pytest.raises(ValueError, match="2 equal parts"):
        expand(small | {"encoder.4.conv.0.weight": torch.zeros(1, 7, 3, 3)})


@pytest.fixture(scope="module")
def written(codec):
    """A network with both halves written down, nothing trained."""
    network = Narrow().requires_grad_(False)
    encoder_start.start(network, codec, WAN, clips=30)
    start = decoder_start.Clips(*clips(codec, frames=17, count=5), WAN.process_out)
    decoder_start.start_coarse(network, start)
    decoder_start.start_fine(network, start)
    return network


@pytest.mark.parametrize("size", [64, 96, 128])
def test_encoder_gives_the_linear_latents(written, codec, size):
    frames, latents = clips(codec, size)
    found = WAN.process_in(written.encode(frames))
    assert found.shape == latents.shape
    error = float((found - latents).square().mean().sqrt() / latents.std())
    assert error < 0.1


def test_first_image_has_the_latent_of_a_clips_first_frame(written, codec):
    frames, _ = clips(codec)
    torch.testing.assert_close(written.encode(frames[:, :, :1]), written.encode(frames)[:, :, :1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [64, 96, 128])
def test_decoder_begins_as_the_linear_codec(written, codec, size):
    """Every one of the 16x16 places gets its own pixel: a decoder that cannot tell them apart gives about 15 dB."""
    frames, latents = clips(codec, size)
    linear = torch.stack([codec.decode_video(clip).movedim(-1, 0) for clip in latents])
    found = written.decode(WAN.process_out(latents)).clamp(0, 1)
    assert -10 * (found - frames).square().mean().log10() > -10 * (linear - frames).square().mean().log10() - 1.5


@pytest.fixture
def small_steps(monkeypatch):
    for name, value in {"START_CLIPS": 2, "START_FRAMES": 9, "COARSE": (2, 1e-3), "FINE": (2, 1e-3), "STEPS": 4,
                        "COARSE_SHAPES": ((32, 5, 1),) * 4, "FINE_SHAPES": ((32, 5, 1),) * 4}.items():
        monkeypatch.setattr(video_codec, name, value)


@pytest.mark.usefixtures("small_steps")
def test_training_goes_on_where_it_stopped(codec, tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = video_codec.Training(tmp_path / "whole", codec)
    whole.train(float("inf"))
    for _ in range(4):
        part = video_codec.Training(tmp_path / "parts", codec)
        part.train_step()
        part.save()
    assert part.step == whole.step == 4
    assert all(torch.equal(part.weights[name], whole.weights[name]) for name in whole.weights)
    assert all(torch.equal(part.average[name], whole.average[name]) for name in whole.average)


@pytest.mark.usefixtures("small_steps")
def test_training_leaves_the_counts_alone(codec, tmp_path):
    training = video_codec.Training(tmp_path, codec)
    for _ in range(2):
        training.train_step()
    training.begin_fine()
    before = {name: value.detach().clone() for name, value in training.weights.items()}
    for _ in range(2):
        training.train_step()
    free = decoder_start.trainable(training.network)
    changed = {name: value != before[name] for name, value in training.weights.items()}
    assert not any((changed[name] & (free[name] == 0)).any() for name in changed)
    assert all(changed[name].any() for name in changed if not name.startswith("17.conv.0"))


def test_the_shipped_codec_is_a_narrow_network_again():
    """Training can go on with it: the same decoder, cut out of the full one."""
    full = {name: value.float() for name, value in expand(load_file(SHIPPED / "video_vae.safetensors")).items()}
    narrow, wide = Narrow(), TAEHV(48)
    narrow.decoder.load_state_dict({name.removeprefix("decoder."): value for name, value in cut(full, {
        f"decoder.{name}": value.shape for name, value in narrow.decoder.state_dict().items()}).items()})
    wide.load_state_dict(full)
    latents = torch.randn(1, 48, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(narrow.decode(latents), wide.decode(latents), atol=1e-3)
