"""First-frame preprocessing: the reference's resize for image-to-video, and crop or stretch to a given size.

Images are ComfyUI's [B, H, W, C] in 0..1; frames are [B, 3, H, W] in -1..1, as the video VAE's network reads them.
Sizes are (height, width) in pixels. Needs torch only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def to_frame(image: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C>=3] in 0..1 -> [B, 3, H, W] in -1..1, dtype kept; alpha is dropped. ValueError for other shapes."""
    if image.ndim != 4 or image.shape[-1] < 3:
        raise ValueError(
            f"The image has shape {list(image.shape)}; expected [batch, height, width, 3 or 4], "
            "as Load Image gives it."
        )
    return image[..., :3].movedim(-1, 1) * 2.0 - 1.0


def to_image(frame: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in -1..1 -> [B, H, W, 3] in 0..1, not clamped."""
    return ((frame + 1.0) / 2.0).movedim(1, -1)


def resize_plain(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The reference's resize, to a size near the image's own aspect ratio (`Geometry.image_target_hw`).

    Plain bicubic without antialiasing, in the frame's dtype and not clamped: it overshoots -1..1 at hard edges, and the
    reference encodes it so. A frame that already has the size comes back as it is.
    """
    if tuple(frame.shape[-2:]) == (height, width):
        return frame
    return F.interpolate(frame, size=(height, width), mode="bicubic", align_corners=False)


def stretch(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize to exactly height x width, changing the aspect ratio; bicubic with antialiasing, not clamped."""
    if tuple(frame.shape[-2:]) == (height, width):
        return frame
    return F.interpolate(frame, size=(height, width), mode="bicubic", align_corners=False, antialias=True)


def center_crop(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Cut the middle with the aspect ratio of height x width out of the frame, then resize it to exactly that."""
    found_height, found_width = frame.shape[-2:]
    keep_height = min(found_height, max(1, round(found_width * height / width)))
    keep_width = min(found_width, max(1, round(found_height * width / height)))
    top, left = (found_height - keep_height) // 2, (found_width - keep_width) // 2
    return stretch(frame[..., top : top + keep_height, left : left + keep_width], height, width)
