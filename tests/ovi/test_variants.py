"""Frame, latent, token and size arithmetic, and the table of checkpoints."""

import subprocess
import sys
from pathlib import Path

import pytest
from ovi_native.ovi_model import geometry
from ovi_native.ovi_model.ovi import variants
from ovi_native.ovi_model.ovi.variants import GEOMETRY
from support.parity_items import sizes


def test_the_rates_of_ovi():
    assert (GEOMETRY.fps, GEOMETRY.patch, GEOMETRY.size_multiple) == (24, 2, 32)
    video, audio = GEOMETRY.video, GEOMETRY.audio
    assert (video.channels, video.temporal_stride, video.spatial_stride) == (48, 4, 16)
    assert (audio.channels, audio.sample_rate, audio.mel_bands, audio.mel_hop) == (20, 16_000, 80, 256)
    assert (audio.samples_per_latent, audio.latents_per_second) == (512, 31.25)
    assert GEOMETRY.video_seconds(31) == 121 / 24 and GEOMETRY.audio_seconds(157) == 5.024
    assert GEOMETRY.latent_hw(704, 1280) == (44, 80) and GEOMETRY.pixel_hw(44, 80) == (704, 1280)


def test_another_family_brings_its_own_rates():
    """Wan2.1's VAE at 25 fps, with sound at 50 features a second."""
    other = geometry.Geometry(25, 2, geometry.VideoCodec(16, 4, 8), geometry.AudioCodec(768, 16_000, 1, 320, 1))
    assert other.size_multiple == 16 and other.snap_hw(481, 833, None) == (480, 832)
    assert other.frames_from_seconds(5) == 125 and other.latent_frames_from_frames(125) == 32
    assert other.audio_latents_for(21) == 162 and other.audio_seconds(162) == 3.24
    assert other.latent_hw(480, 832) == (60, 104) and other.video_tokens(21, 480, 832) == 21 * 30 * 52


@pytest.mark.parametrize("name, frames, audio, area, style", [
    ("720x720_5s", 121, 157, 518400, "tagged"),
    ("960x960_5s", 121, 157, 921600, "plain"),
    ("960x960_10s", 241, 314, 921600, "plain"),
])
def test_variant_table(name, frames, audio, area, style):
    variant = variants.get_variant(name)
    assert (variant.frames, variant.audio_latents, variant.area, variant.caption_style) == (frames, audio, area, style)
    assert GEOMETRY.audio_latents_for(variant.latent_frames) == variant.audio_latents
    assert GEOMETRY.latent_frames_from_frames(variant.frames) == variant.latent_frames
    assert f"{variant.seconds:.2f}" in ("5.04", "10.04")


def test_unknown_variant_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'480p'.*720x720_5s, 960x960_5s, 960x960_10s"):
        variants.get_variant("480p")


@pytest.mark.parametrize("seconds, frames", [
    (5.0, 121), (5.04, 121), (10.0, 241), (10.04, 241), (1.0, 25), (0.01, 1), (4.9, 117), (4.96, 121)])
def test_seconds_snap_to_the_nearest_4n_plus_1(seconds, frames):
    assert GEOMETRY.frames_from_seconds(seconds) == frames


@pytest.mark.parametrize("frames, snapped", [(1, 1), (2, 1), (3, 5), (119, 121), (118, 117), (121, 121), (240, 241)])
def test_frames_snap(frames, snapped):
    assert GEOMETRY.snap_frames(frames) == snapped


@pytest.mark.parametrize("function, value", [
    (GEOMETRY.snap_frames, 0), (GEOMETRY.frames_from_seconds, 0.0), (GEOMETRY.frames_from_seconds, -1.0),
    (GEOMETRY.frames_from_seconds, float("nan")), (GEOMETRY.latent_frames_from_frames, 120),
    (GEOMETRY.latent_frames_from_frames, -3), (GEOMETRY.frames_from_latent, 0)])
def test_impossible_lengths_are_refused(function, value):
    with pytest.raises(ValueError, match=str(value)):
        function(value)


def test_sound_is_as_long_as_the_picture_at_every_length():
    latents = [GEOMETRY.audio_latents_for(latent_frames) for latent_frames in range(1, 800)]
    assert latents == sorted(latents)
    for latent_frames, audio in enumerate(latents, start=1):
        difference = GEOMETRY.audio_seconds(audio) - GEOMETRY.frames_from_latent(latent_frames) / GEOMETRY.fps
        assert -0.024 < difference < 0.008, latent_frames


@pytest.mark.parametrize("height, width, tokens", [(704, 1280, 27280), (720, 720, 31 * 23 * 23), (32, 16, 31)])
def test_video_tokens(height, width, tokens):
    assert GEOMETRY.video_tokens(31, height, width) == tokens


def test_every_shape_is_the_area_of_its_variant():
    for variant in variants.VARIANTS.values():
        for label, (rows, columns) in variants.ASPECTS.items():
            height, width = variants.size_for(label, variant)
            assert not geometry.area_is_off(height, width, variant.area)
            assert width / height == pytest.approx(columns / rows, rel=0.04)
            assert label.startswith(f"{columns}:{rows} ")


def test_old_presets_keep_their_size_for_their_own_variant_up_to_snapping():
    """What each size that the reference recommends becomes; five of the nine are on grid and area already."""
    made = {}
    for label, (height, width) in variants.OLD_ASPECTS.items():
        owner = variants.VARIANTS["720x720_5s" if "(720 " in label else "960x960_5s"]
        assert label.startswith(f"{width}x{height} (")
        made[width, height] = variants.size_for(label, owner)[::-1]
        assert not geometry.area_is_off(height, width, owner.area)
    assert made == {
        (1280, 704): (1280, 704), (704, 1280): (704, 1280), (960, 960): (960, 960), (992, 512): (992, 512),
        (512, 992): (512, 992), (960, 512): (992, 512), (512, 960): (512, 992), (720, 720): (704, 704),
        (1120, 448): (1152, 448)}


@pytest.mark.parametrize("function", [
    lambda h, w: GEOMETRY.snap_hw(h, w, 518400), lambda h, w: GEOMETRY.snap_hw(h, w, None), geometry.scale_hw_to_area,
    lambda h, w: GEOMETRY.image_target_hw(h, w, 518400), lambda h, w: GEOMETRY.image_target_hw(h, w, None)])
@pytest.mark.parametrize("size", [(0, 100), (100, 0), (-32, 32)])
def test_empty_sizes_are_refused(function, size):
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]}"):
        function(*size)


def test_image_size_differs_from_text_size_where_the_reference_differs():
    assert GEOMETRY.snap_hw(480, 640, 518400) == (640, 832)
    assert GEOMETRY.image_target_hw(480, 640, 518400) == (608, 832)


def test_sizes_equal_the_reference(golden):
    found = list(sizes.items(golden))
    assert len(found) == 18
    assert [item for item in found if not item.ok] == []


def test_missing_reference_numbers_fail(tmp_path):
    assert [item.ok for item in sizes.items(tmp_path)] == [False]


def test_arithmetic_needs_only_the_standard_library():
    path = Path(geometry.__file__)
    code = f"import sys; sys.path.insert(0, {str(path.parent)!r}); import geometry; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
