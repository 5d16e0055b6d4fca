"""First-frame resizing: the reference's, centre crop and stretch."""

import pytest
import torch
from ovi_native.ovi_model.media import images
from support.parity_items import images as parity


def picture(height: int, width: int) -> torch.Tensor:
    """[1, H, W, 3]: red rises to the right, green downwards."""
    across = torch.linspace(0, 1, width).expand(height, width)
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    return torch.stack((across, down, torch.full((height, width), 0.5)), dim=-1)[None]


def test_resize_equals_the_reference(golden):
    found = list(parity.items(golden))
    assert len(found) == 6
    assert [item for item in found if not item.ok] == []


def test_missing_reference_images_fail(tmp_path):
    assert [item.ok for item in parity.items(tmp_path)] == [False]


def test_frame_and_image_are_inverse_and_alpha_is_dropped():
    image = torch.rand(2, 8, 6, 4)
    frame = images.to_frame(image)
    assert frame.shape == (2, 3, 8, 6)
    assert frame.min() < 0
    torch.testing.assert_close(images.to_image(frame), image[..., :3])


@pytest.mark.parametrize("shape", [(8, 6, 3), (1, 8, 6, 1), (1, 8, 6)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[batch, height, width, 3 or 4\]"):
        images.to_frame(torch.zeros(shape))


def test_reference_resize_overshoots_and_is_not_clamped():
    image = torch.zeros(1, 40, 40, 3)
    image[:, :, 20:] = 1.0
    assert images.resize_plain(images.to_frame(image), 64, 64).max() > 1.01


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (32, 160), (64, 64)])
@pytest.mark.parametrize("source", [(120, 200), (200, 120), (31, 33)])
def test_crop_keeps_the_aspect_ratio_and_the_middle(source, size):
    frame = images.center_crop(images.to_frame(picture(*source)), *size)
    assert frame.shape[-2:] == size
    across, down = frame[0, 0], frame[0, 1]
    assert abs(across.mean()) < 0.05 and abs(down.mean()) < 0.05  # the middle of both ramps is 0
    width_kept = (across[:, -1] - across[:, 0]).mean() * source[1]
    height_kept = (down[-1] - down[0]).mean() * source[0]
    assert width_kept / height_kept == pytest.approx(size[1] / size[0], rel=0.1)
    assert max(width_kept / source[1], height_kept / source[0]) > 1.8  # nothing is cut from the other side


def test_stretch_keeps_the_whole_image():
    frame = images.stretch(images.to_frame(picture(120, 200)), 64, 64)
    assert frame.shape[-2:] == (64, 64)
    assert (frame[0, 0, :, -1] - frame[0, 0, :, 0]).mean() > 1.9
    assert (frame[0, 1, -1] - frame[0, 1, 0]).mean() > 1.9


def test_shrinking_a_fine_pattern_gives_its_average():
    image = torch.zeros(1, 512, 512, 3)
    image[:, ::2, ::2] = 1.0
    frame = images.center_crop(images.to_frame(image), 64, 64)
    assert (frame[..., 4:-4, 4:-4] + 0.5).abs().max() < 0.02


@pytest.mark.parametrize("function", [images.stretch, images.center_crop])
def test_right_size_is_left_alone(function):
    frame = images.to_frame(picture(64, 96))
    assert torch.equal(function(frame, 64, 96), frame)
