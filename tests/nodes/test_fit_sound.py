"""'Ovi Fit Sound' by the sample and 'Ovi Fit Sound Latent' by the latent: what is kept is kept to the bit."""

import math

import pytest
import torch
from comfy.nested_tensor import NestedTensor
from devlib.graphs import files, node
from devlib.media import read_media
from ovi_native.nodes.sound import OviFitSound, OviFitSoundLatent
from ovi_native.ovi_model.ovi.variants import GEOMETRY


def sound(seconds: float = 1.0, rate: int = 44_100, channels: int = 2, batch: int = 1) -> dict:
    waveform = torch.rand(batch, channels, round(seconds * rate), generator=torch.Generator().manual_seed(0)) - 0.5
    return {"waveform": waveform, "sample_rate": rate}


def fit(audio, seconds=0.0, frames=0, fps=24.0, fade=0.0, **connected):
    return OviFitSound.execute(audio, seconds, frames, fps, fade, **connected)


def text(output) -> str:
    return output.ui.as_dict()["text"][0]


# --- AUDIO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels, batch", [(1, 1), (2, 3)])
@pytest.mark.parametrize("before", [0.01, 5.0, 7.0])
def test_sample_exact(rate, channels, batch, before):
    audio = sound(before, rate, channels, batch)
    given = audio["waveform"].clone()
    out = fit(audio, frames=121)
    found, seconds, kept = out.args[0], out.args[1], min(given.shape[-1], round(121 * rate / 24))
    assert found["waveform"].shape == (batch, channels, round(121 * rate / 24)) and found["sample_rate"] == rate
    assert torch.equal(found["waveform"][..., :kept], given[..., :kept])
    assert not found["waveform"][..., kept:].any()
    assert seconds == found["waveform"].shape[-1] / rate
    assert torch.equal(audio["waveform"], given), "the input was changed"


def test_it_says_what_it_did():
    assert "lasted 1.000 s and lasts 0.500 s now (length from seconds): 0.500 s were cut" in text(fit(sound(), 0.5))
    assert "lasts 2.000 s now (length from frames): 1.000 s were added" in text(fit(sound(), frames=48))
    assert "lasts 1.000 s already (length from seconds): nothing was changed" in text(fit(sound(), 1.0))


def test_the_length_comes_from_what_is_connected():
    latent = {"samples": NestedTensor((torch.zeros(2, 48, 31, 4, 6), torch.zeros(2, 20, 157)))}
    images = torch.zeros(48, 8, 8, 3)
    assert fit(sound(), images=images).args[1] == 2.0
    assert fit(sound(), images=images, fps=48.0).args[1] == 1.0
    assert fit(sound(rate=48_000), latent=latent).args[0]["waveform"].shape[-1] == 242_000
    assert fit(sound(rate=48_000), latent={"samples": latent["samples"].unbind()[0]}).args[1] == 121 / 24
    out = fit(sound(), 9.0, 24, images=images)
    assert out.args[1] == 2.0
    assert "⚠ frames (1.00 s) was not used: images goes before it." in text(out)
    assert "⚠ seconds (9.00 s) was not used: images goes before it." in text(out)
    assert "⚠" not in text(fit(sound(), 2.0, images=images)), "they agree"


def test_typed_numbers_are_taken_as_typed():
    """0.1 s at 16 kHz is 1600 samples, and 23.976 frames per second are 23.976."""
    assert fit(sound(rate=16_000), 0.1).args[0]["waveform"].shape[-1] == 1600
    assert fit(sound(rate=48_000), frames=23976, fps=23.976).args[0]["waveform"].shape[-1] == 48_000_000


def test_fade_is_short_and_only_where_something_ends():
    audio = {"waveform": torch.ones(1, 1, 1000), "sample_rate": 1000}
    cut = fit(audio, 0.5, fade=0.01).args[0]["waveform"][0, 0]
    assert torch.equal(cut[:490], torch.ones(490)) and cut[-1] == 0
    torch.testing.assert_close(cut[490:], torch.linspace(0.9, 0, 10))
    padded = fit(audio, 2.0, fade=0.01).args[0]["waveform"][0, 0]
    assert torch.equal(padded[:990], torch.ones(990)) and not padded[999:].any() and 0 < padded[995] < 1
    assert torch.equal(fit(audio, 1.0, fade=0.01).args[0]["waveform"], audio["waveform"])
    assert fit(audio, 0.005, fade=60.0).args[0]["waveform"].shape[-1] == 5, "a fade longer than the sound"


@pytest.mark.parametrize("audio", [
    None, {"waveform": torch.zeros(1000), "sample_rate": 16_000}, {"waveform": torch.zeros(0, 1, 9), "sample_rate": 1},
    {"waveform": torch.zeros(1, 0, 9), "sample_rate": 1}, {"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}])
def test_no_sound_is_a_sentence(audio):
    with pytest.raises(ValueError, match="needs AUDIO with a waveform"):
        fit(audio, 1.0)


def test_an_empty_sound_becomes_silence():
    assert fit(sound(0.0), 1.0).args[0]["waveform"].shape == (1, 2, 44_100)


@pytest.mark.parametrize("inputs, match", [
    ({}, "was given no length"), ({"seconds": math.nan}, "seconds of 'Ovi Fit Sound' is nan; it goes from 0 to 3600"),
    ({"seconds": math.inf}, "seconds .* is inf"), ({"seconds": -1.0}, "seconds .* is -1"),
    ({"frames": 1, "fps": math.nan}, "fps .* is nan"), ({"frames": 1, "fps": 0.0}, "fps .* is 0"),
    ({"frames": 1, "fade": math.nan}, "fade .* is nan"), ({"frames": -5}, "frames .* is -5"),
    ({"images": torch.zeros(0, 8, 8, 3)}, "no sample at 44100 Hz"), ({"seconds": 1e-6}, "no sample at 44100 Hz"),
    ({"latent": {"samples": torch.zeros(1, 20, 157)}}, "has no frames"),
    ({"latent": {"samples": torch.zeros(1, 48, 0, 4, 6)}}, "At least 1 latent frame"),
])
def test_lengths_that_are_none(inputs, match):
    with pytest.raises(ValueError, match=match):
        fit(sound(), **inputs)


def test_sound_that_is_not_finite():
    audio = sound()
    audio["waveform"][0, 1, 7] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        fit(audio, 1.0)


# --- the sound of a joint latent --------------------------------------------------------------------------------------


def joint(frames: int, audio: int, batch: int = 1, sounds: int | None = None, **extra) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"samples": NestedTensor((torch.randn(batch, 48, frames, 4, 6, generator=generator),
                                     torch.randn(sounds or batch, 20, audio, generator=generator))), **extra}


@pytest.mark.parametrize("frames", [1, 2, 31, 61])
@pytest.mark.parametrize("audio", [1, 157, 400])
def test_as_many_audio_latents_as_the_picture_needs(frames, audio):
    latent = joint(frames, audio, batch=2, ovi_variant="960x960_5s")
    video, given = latent["samples"].unbind()
    out = OviFitSoundLatent.execute(latent).args[0]
    length, kept = GEOMETRY.audio_latents_for(frames), min(audio, GEOMETRY.audio_latents_for(frames))
    found_video, found = out["samples"].unbind()
    assert found_video is video and found.shape == (2, 20, length)
    assert torch.equal(found[..., :kept], given[..., :kept]) and not found[..., kept:].any()
    assert out["ovi_variant"] == "960x960_5s" and "noise_mask" not in out
    assert latent["samples"].unbind()[1] is given and given.shape[-1] == audio, "the input was changed"


def test_one_sound_for_several_clips_leaves_the_input_as_it_was():
    latent = joint(3, 5, batch=2, sounds=1)
    given = latent["samples"].unbind()[1]
    assert OviFitSoundLatent.execute(latent).args[0]["samples"].unbind()[1].shape[0] == 2
    assert latent["samples"].unbind()[1] is given and given.shape[0] == 1, "the input was changed"


@pytest.mark.parametrize("shape", [(1, 1, 100), (1, 20, 100), (2, 20, 100), (1, 1, 8, 100), (1, 1, 50)])
@pytest.mark.parametrize("frames", [2, 31])
def test_the_noise_mask_goes_with_it(frames, shape):
    """The sound given is kept, what is missing is made; masks of every form that core's nodes leave."""
    masks = NestedTensor((torch.ones(1, 1, frames, 4, 6), torch.zeros(shape)))
    out = OviFitSoundLatent.execute(joint(frames, 100, batch=2, noise_mask=masks)).args[0]
    video_mask, mask = out["noise_mask"].unbind()
    length = GEOMETRY.audio_latents_for(frames)
    assert video_mask is masks.unbind()[0] and mask.shape[0] == 2 and mask.shape[-1] == length
    assert not mask[..., :100].any() and mask[..., 100:].all()


def test_a_mask_that_varies_stays_where_it_was():
    mask = torch.rand(1, 1, 100)
    masks = NestedTensor((torch.ones(1, 1, 31, 4, 6), mask))
    found = OviFitSoundLatent.execute(joint(31, 100, noise_mask=masks)).args[0]["noise_mask"].unbind()[1]
    assert torch.equal(found[..., :100], mask)


def test_a_mask_of_the_picture_alone_is_left():
    mask = torch.ones(1, 1, 64, 96)
    assert OviFitSoundLatent.execute(joint(3, 100, noise_mask=mask)).args[0]["noise_mask"] is mask


def test_one_sound_serves_all_clips():
    latent = joint(2, 9, batch=3, sounds=1)
    found = OviFitSoundLatent.execute(latent).args[0]["samples"].unbind()[1]
    assert found.shape[0] == 3 and torch.equal(found[2], latent["samples"].unbind()[1][0, :, :found.shape[2]])
    found[0] += 1
    assert not torch.equal(found[0], found[1]), "the clips share one memory"


def test_it_says_what_it_did_to_the_latent():
    assert "lasted 12.800 s and lasts 5.024 s now (length from the picture, 5.04 s): 7.776 s were cut" in text(
        OviFitSoundLatent.execute(joint(31, 400)))
    assert "nothing was changed" in text(OviFitSoundLatent.execute(joint(31, 157)))


@pytest.mark.parametrize("latent, match", [
    ({"samples": torch.zeros(1, 48, 3, 4, 6)}, "join a video and an audio latent with 'Concat AV Latent'"),
    (joint(3, 9, batch=3, sounds=2), "3 clips of picture but 2 of sound"), (joint(0, 9), "empty joint latent"),
    ({"samples": NestedTensor((torch.zeros(1, 48, 3, 4, 6), torch.zeros(1, 8, 9, 4)))}, "needs a joint latent"),
])
def test_latents_that_cannot_be_fitted(latent, match):
    with pytest.raises(ValueError, match=match):
        OviFitSoundLatent.execute(latent)


def test_in_a_server(comfy_client):
    run = comfy_client.run({
        "empty": node("EmptyAudio", duration=2.0, sample_rate=48_000, channels=2),
        "fit": node("OviFitSound", audio=["empty", 0], seconds=0.0, frames=33, fps=24.0, fade=0.0),
        "save": node("SaveAudio", audio=["fit", 0], filename_prefix="fit"),
    })
    assert read_media(files(comfy_client, run, "save")[0]).sound.shape == (66_000, 2)
