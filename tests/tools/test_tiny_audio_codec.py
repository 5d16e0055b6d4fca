"""The sound codec of the trained tiny Ovi: what it learns, and that the product loads what was trained."""

import copy
import time

import numpy as np
import pytest
import torch
from comfy.ldm.mmaudio.vae.bigvgan import BigVGANVocoder
from ovi_native.ovi_model.media.audio_vae import (
    VOCODER_CONFIG,
    decode_waveform,
    encode_mean,
    fold_weight_norm,
    load_audio_vae,
)
from ovi_native.tiny_world.scenes import Face, Scene
from safetensors.torch import load_file, save_file
from tiny_ovi import audio_codec
from tiny_ovi.audio_codec import Run, at_half, build_vae, vae_tensors
from tiny_ovi.audio_codec_measures import draw_held_out, recognise
from tiny_ovi.files import SHIPPED
from tiny_ovi.latents import Basis, Codec, Spectra, fit, pairs
from tiny_ovi.locked import FRAME, locked_sound
from tiny_ovi.vocoder import TRAINED_BLOCKS, WIDTH, Vocoder, vocoder_loss, vocoder_tensors


@pytest.fixture(scope="module")
def codec() -> Codec:
    """Fitted to noise: quick, and of the right shapes."""
    torch.manual_seed(0)
    mel = Spectra()(0.1 * torch.randn(4, 16_384))
    return Codec(Basis(*(torch.zeros(1) for _ in range(3))), fit(pairs(mel).flatten(0, 1), 20))


@pytest.fixture(scope="module")
def sounds(codec) -> audio_codec.Sounds:
    return audio_codec.draw_sounds(codec, 3, 96, seed=1)


@pytest.fixture
def vae(sounds):
    torch.manual_seed(1)
    vae = build_vae(8)
    audio_codec.place_origin(vae, sounds.mel)
    return vae


@pytest.fixture
def vocoder():
    torch.manual_seed(2)
    return Vocoder()


def written(folder, vae, vocoder, form=lambda tensors: tensors):
    """Both as files, through the product's loader."""
    paths = [folder / audio_codec.VAE_FILE, folder / audio_codec.VOCODER_FILE]
    for path, tensors in zip(paths, (vae_tensors(vae), vocoder_tensors(vocoder)), strict=True):
        save_file(form(tensors), path)
    return load_audio_vae(*map(str, paths))


def test_the_product_computes_what_was_trained(tmp_path, vae, vocoder, sounds):
    loaded = written(tmp_path, vae, vocoder)
    with torch.no_grad():
        latents = vae.encode(sounds.mel).mean
        waves = vocoder(vae.decode(latents))
    torch.testing.assert_close(encode_mean(loaded, sounds.samples[:, None]).cpu(), latents, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(decode_waveform(loaded, latents).cpu(), waves, rtol=1e-3, atol=1e-4)


def test_half_precision_files_load_and_hardly_differ(tmp_path, vae, vocoder, sounds):
    loaded = written(tmp_path, vae, vocoder, at_half)
    with torch.no_grad():
        latents = vae.encode(sounds.mel).mean
    assert (encode_mean(loaded, sounds.samples[:, None]).cpu() - latents).abs().max() < 0.05
    assert (tmp_path / audio_codec.VOCODER_FILE).stat().st_size < 0.7 * sum(
        value.numel() * 4 for value in vocoder_tensors(vocoder).values())


def test_half_precision_leaves_out_what_must_be_exact(vae, vocoder):
    tensors = at_half(vae_tensors(vae) | vocoder_tensors(vocoder))
    whole = {name for name, value in tensors.items() if value.dtype == torch.float32}
    assert {"data_mean", "data_std"} <= whole
    assert all(name.endswith(".filter") for name in whole - {"data_mean", "data_std"})


def test_kernels_are_written_before_their_normalisation(vae):
    kernel = vae_tensors(vae)["decoder.conv_out.weight"]
    assert (torch.linalg.vector_norm(kernel, dim=(1, 2)) - 1).abs().min() > 0.5
    assert torch.linalg.vector_norm(vae.decoder.conv_out.weight, dim=(1, 2)).sub(1).abs().max() < 0.01


def test_the_blocks_left_out_in_training_add_nothing(vocoder):
    core = BigVGANVocoder({**VOCODER_CONFIG, "num_mels": 80, "upsample_initial_channel": WIDTH})
    core.load_state_dict(vocoder.state_dict())
    mel = torch.randn(2, 80, 9) - 3
    torch.testing.assert_close(vocoder(mel), core(mel), rtol=1e-4, atol=1e-6)
    idle = [parameter for index, block in enumerate(vocoder.resblocks) if index not in TRAINED_BLOCKS
            for parameter in block.parameters()]
    assert idle and not any(parameter.requires_grad for parameter in idle)


def test_the_origin_of_the_spectra_lies_off_all_of_them(vae, sounds):
    """Else silence and loud sounds lie in one direction, which blocks that divide by lengths cannot tell apart."""
    frames = vae.normalize(sounds.mel).movedim(1, -1).flatten(0, 1)
    lengths = torch.linalg.vector_norm(frames, dim=1)
    assert lengths.min() > 0.2 * lengths.max()
    constant = torch.linalg.lstsq(frames, torch.ones(len(frames), 1)).solution
    assert (frames @ constant - 1).abs().max() < 0.2


def test_latents_are_those_of_the_linear_codec(codec, sounds):
    assert sounds.latents.shape == (3, 20, 96) and sounds.mel.shape == (3, 80, 192)
    expected = (pairs(sounds.mel) - codec.audio.mean) @ codec.audio.components
    torch.testing.assert_close(sounds.latents, expected.transpose(1, 2))
    assert not torch.equal(sounds.samples, audio_codec.draw_sounds(codec, 3, 96, seed=2).samples)


def test_spectra_are_those_of_the_product(tmp_path, vae, vocoder, sounds):
    loaded = written(tmp_path, vae, vocoder)
    torch.testing.assert_close(loaded.first_stage_model.mel_converter(sounds.samples).cpu(), sounds.mel,
                               rtol=1e-4, atol=1e-4)


def test_crops_keep_samples_spectra_and_latents_together(codec, sounds):
    part = audio_codec.crop(torch.Generator().manual_seed(0), sounds, 4, 8)
    assert part.samples.shape == (4, 4096) and part.mel.shape == (4, 80, 16) and part.latents.shape == (4, 20, 8)
    torch.testing.assert_close(codec.encode_audio(part.mel), part.latents)
    torch.testing.assert_close(Spectra()(part.samples)[..., 4:-4], part.mel[..., 4:-4], rtol=1e-3, atol=1e-3)
    assert all(any(torch.equal(part.locked[i], whole) for whole in sounds.locked.unfold(1, 4096, 512).flatten(0, 1))
               for i in range(4))


class Stopped(Run):
    """Ends in the middle, right after a save."""

    def update(self, loss):
        super().update(loss)
        if self.step == 2:
            self.save()
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["vae", "vocoder"])
def test_training_goes_on_bit_by_bit_after_a_stop(tmp_path, request, sounds, codec, name):
    def train(run):
        until = time.time() + 60
        if name == "vae":
            audio_codec.train_vae(run, sounds, until)
        else:
            audio_codec.train_vocoder(run, sounds, codec.decode_audio, until)

    nets = [request.getfixturevalue(name)]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    start = copy.deepcopy(nets[0].state_dict())
    train(Run(nets[0], tmp_path / "whole", 3, 1e-3, seed=3))
    with pytest.raises(KeyboardInterrupt):
        train(Stopped(nets[1], tmp_path / "stopped", 3, 1e-3, seed=3))
    resumed = Run(nets[2], tmp_path / "stopped", 3, 1e-3, seed=3)
    assert resumed.step == 2
    train(resumed)
    for key, value in nets[0].state_dict().items():
        assert torch.equal(value, nets[2].state_dict()[key]), key
    assert any(not torch.equal(value, start[key]) for key, value in nets[0].state_dict().items())


def test_locked_sounds_repeat_with_the_frame_and_are_told_apart_like_the_world_s_own():
    scenes, _ = draw_held_out(12, seed=3)
    sounds = [locked_sound(scene, 157 * 512) for scene in scenes]
    found = recognise(scenes, torch.from_numpy(np.stack(sounds)))
    assert found["onset F1"] > 0.98 and min(found["timbre"], found["vowel"], found["voice"]) > 0.97
    face = Scene(face=Face("red", "low", ("a",), start=0.5))
    held = locked_sound(face, 16_000)[round(0.6 * 16_000):round(0.85 * 16_000)]
    assert np.abs(held[FRAME:] - held[:-FRAME]).max() < 1e-3 < np.abs(held).max()


def test_the_vocoder_s_loss_weighs_quiet_windows_as_loud_ones(sounds):
    wanted = sounds.locked[:2]
    assert float(vocoder_loss(wanted, wanted)) == pytest.approx(0.1, abs=1e-3)  # the root of what is added
    loud = wanted[:, 1024:-1024].unfold(1, 256, 256).square().mean(-1)
    half = torch.where(wanted.abs() > 0, 0.5 * wanted, wanted)
    assert 0.2 < float(vocoder_loss(half, wanted)) < 1 and loud.max() > 0


def test_training_can_go_on_with_the_shipped_pair():
    """What is written again is what was read, to float16."""
    vae, vocoder = build_vae(), Vocoder()
    audio_codec.begin_with(vae, vocoder, SHIPPED)
    for name, tensors in (("audio_vae", vae_tensors(vae)), ("vocoder", vocoder_tensors(vocoder))):
        shipped = load_file(SHIPPED / f"{name}.safetensors")
        assert tensors.keys() == shipped.keys()
        found, truth = ({key: value.float() for key, value in part.items()} for part in (tensors, shipped))
        if name == "vocoder":
            found, truth = fold_weight_norm(found), fold_weight_norm(truth)
        assert all(torch.allclose(found[key], truth[key], rtol=2e-3, atol=1e-5) for key in truth)
