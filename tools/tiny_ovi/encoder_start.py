"""The encoder before training: the linear codec itself, as far as a narrow TAEHV can hold it.

Every level of the encoder halves the sides and keeps, of what it sees, the 31 numbers from which the latents can best
be told (a reduced-rank regression on the world's pictures). All numbers are kept above 0, so that ReLU lets them pass:
a level's first block adds what that takes.

    level  grid       channels 0..30 and 31..61, at first            after its second block
    1      4 pixels   frame 2j, frame 2j + 1                         frame 2j - 1, frame 2j
    2      8 pixels   pictures of step 2i and 2i + 1 of level 1      of step 2i - 1 and 2i: frames 4i - 3 .. 4i
    3      16 pixels  the latents

Core groups frames 4i .. 4i + 3; latent i describes 4i - 3 .. 4i. So the second blocks, which see one step back, put the
newer half of the step before in front of the older half of their own. Before the first step core gives a block zeros:
channel 62, which is 1 everywhere else, tells it to put the older half twice, as if the first frame had stood still.
"""

from __future__ import annotations

import numpy as np
import torch
from comfy.taesd.taehv import apply_model_with_memblocks
from ovi_native.tiny_world.picture import FPS, render_frames
from ovi_native.tiny_world.scenes import draw_scene
from torch import nn

from .latents import FRAMES_PER_LATENT, SIZE, VIDEO_CHANNELS, Codec, patches
from .taehv import PATCH, PIXELS, Block, Narrow

KEPT, MARK, CLIPS, FRAMES = 31, 62, 80, 17
MARGIN = 1.15  # how far beyond the pictures seen here the numbers may go


def reduce(functionals: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x [D]: the KEPT numbers R x, of variance 1, from which `functionals` [n, D] of x are best told; and the L with
    x ~ L R x."""
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.clamp(min=1e-9 * float(values.max()))
    root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    seen = functionals.double() @ root
    best = torch.linalg.eigh(seen.T @ seen)[1][:, -KEPT:].flip(1)
    return (best.T @ inverse).float(), (root @ best).float()


def covariance(x: torch.Tensor) -> torch.Tensor:
    x = (x.flatten(0, -2) - x.flatten(0, -2).mean(0)).double()
    return x.T @ x / len(x)


@torch.no_grad()
def start(network: Narrow, codec: Codec, wan, clips: int = CLIPS, seed: int = 1) -> None:
    """Write these weights into the network's encoder, which must have its default widths.

    wan: core's latent format, whose means and deviations make raw latents of whitened ones.
    """
    random = np.random.default_rng(seed)
    films = []
    for _ in range(clips):
        first = int(random.integers(40))
        films.append(render_frames(draw_scene(random, (first + FRAMES) / FPS), first + FRAMES, SIZE)[first:])
    reduced = _reductions(codec, films)
    e = network.encoder
    _clear(e)
    identity = torch.eye(PIXELS)
    e[0].weight[:, :, 1, 1] = identity
    e[2].conv.weight[:, :, 0, 0] = torch.eye(2 * PIXELS)
    for half in range(2):
        out, inputs = slice(half * KEPT, (half + 1) * KEPT), slice(half * PIXELS, (half + 1) * PIXELS)
        kernel = reduced[0].reshape(KEPT, 2, 2, 2, 2, 3)  # tap row, row in it, tap column, column in it, colour
        e[3].weight[out, inputs, 1:, 1:] = kernel.permute(0, 5, 2, 4, 1, 3).flatten(1, 3)
        e[7].conv.weight[out, half * 64:half * 64 + 2 * KEPT, 0, 0] = reduced[1]
        e[8].weight[out, out, 1:, 1:] = reduced[2].reshape(KEPT, 2, 2, KEPT).permute(0, 3, 1, 2)
    e[12].conv.weight[:, :, 0, 0] = torch.eye(64)
    x = torch.stack([torch.from_numpy(clip) for clip in films]).movedim(-1, 2).float() / 255
    x = torch.cat([x, x[:, -1:].expand(-1, -FRAMES % FRAMES_PER_LATENT, -1, -1, -1)], 1)
    z = torch.stack([codec.encode_video(clip) for clip in films]).transpose(1, 2)
    x = _run(e[:4], x, PATCH)
    for first, shift in ((4, True), (9, True), (14, False)):
        _lift(e, first, x)
        x = _run(e[first:first + 1], x)
        if shift:
            _shift(e[first + 1], x)
        x = _run(e[first + 1:first + (4 if shift else 3)], x)
        if first == 9:
            _regress(e[13], x, z)
        x = _run(e[first + 4:first + 5], x) if shift else x
    _finish(e[17], x, z, wan)


def _reductions(codec: Codec, clips: list[np.ndarray]) -> list[torch.Tensor]:
    """Of 4x4 pixels of a frame [31, 48], two frames of those [31, 62], 2x2 of those [31, 124]."""
    x = torch.cat([patches(clip).flatten(0, 2) for clip in clips])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:8000]]
    x, w = (v.reshape(-1, 4, 4, 4, 4, 4, 3).permute(0, 1, 2, 4, 3, 5, 6).flatten(4)  # n, frame, row, column, 48
            for v in (x, codec.video.components.T))
    found = []
    for step in range(3):
        if step == 1:  # pairs of frames
            x, w = (v.unflatten(1, (2, 2)).movedim(2, -2).flatten(-2) for v in (x, w))
        if step == 2:  # 2x2
            x, w = (v.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 1, 2, 4, 3, 5, 6).flatten(-3)
                    for v in (x, w))
        matrix, lift = reduce(w.flatten(0, -2), covariance(x))
        x, w = x @ matrix.T, w @ lift
        found.append(matrix)
    return found


def _clear(encoder: nn.Sequential) -> None:
    """All weights 0: a block passes on what it is given."""
    for parameter in encoder.parameters():
        parameter.zero_()


def _run(layers: nn.Sequential, x: torch.Tensor, patch: int = 1) -> torch.Tensor:
    """[B, T, C, H, W] -> [B, T', C', h, w]."""
    return torch.cat([apply_model_with_memblocks(layers, part, True, False, patch_size=patch)
                      for part in x.clone().split(16)])


def _lift(encoder: nn.Sequential, index: int, x: torch.Tensor) -> None:
    """The block at index adds what keeps x above 0, the same to both halves, and sets the mark."""
    low, high = x.amin((0, 1, 3, 4)), x.amax((0, 1, 3, 4))
    need = (-low + (MARGIN - 1) * (high - low)).clamp(min=0)
    need[:2 * KEPT] = need[:2 * KEPT].reshape(2, KEPT).amax(0).repeat(2)
    need[MARK:] = torch.tensor([1.0, 0.0])
    encoder[index].conv[4].bias.copy_(need)


def _shift(block: Block, x: torch.Tensor) -> None:
    """Newer half of the step before, older half of this one; the older half twice if there is no step before."""
    older, newer, one = slice(0, KEPT), slice(KEPT, 2 * KEPT), torch.eye(KEPT)
    reach = MARGIN * x[:, :, :2 * KEPT].amax((0, 1, 3, 4)).reshape(2, KEPT).amax(0)
    first, second, last = block.conv[0], block.conv[2], block.conv[4]
    for layer in (first, second, last):
        layer.weight.zero_()
    before = 64
    first.weight[older, before + KEPT:before + 2 * KEPT, 1, 1] = one
    first.weight[older, older, 1, 1] = -one
    first.weight[older, before + MARK, 1, 1] = reach
    first.weight[newer, older, 1, 1] = one
    first.weight[newer, newer, 1, 1] = -one
    first.bias[newer] = reach
    first.weight[MARK, before + MARK, 1, 1] = 1
    second.weight[:MARK + 1, :MARK + 1, 1, 1] = torch.eye(MARK + 1)
    last.weight[:2 * KEPT, :2 * KEPT, 1, 1] = torch.eye(2 * KEPT)
    last.weight[older, MARK, 1, 1] = -reach
    last.bias[newer] = -reach


def _regress(layer: nn.Conv2d, x: torch.Tensor, z: torch.Tensor) -> None:
    """The latents from 2x2 places; what is constant in them is left out."""
    x = x[:, :, :2 * KEPT].unflatten(3, (-1, 2)).unflatten(5, (-1, 2)).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
    x, z = x.flatten(0, 3).double(), z.permute(0, 1, 3, 4, 2).flatten(0, 3).double()
    x, z = x - x.mean(0), z - z.mean(0)
    square = x.T @ x
    found = torch.linalg.solve(square + 1e-6 * square.diagonal().mean() * torch.eye(len(square)), x.T @ z)
    layer.weight[:VIDEO_CHANNELS, :2 * KEPT, 1:, 1:] = found.T.float().reshape(VIDEO_CHANNELS, 2 * KEPT, 2, 2)


def _finish(layer: nn.Conv2d, x: torch.Tensor, z: torch.Tensor, wan) -> None:
    """Raw latents, which the model's normalisation turns into whitened ones."""
    deviation, mean = (getattr(wan, f"latents_{part}").flatten() for part in ("std", "mean"))
    layer.weight[:, :VIDEO_CHANNELS, 1, 1] = deviation.diag()
    offset = (z.mean((0, 1, 3, 4)) - x[:, :, :VIDEO_CHANNELS].mean((0, 1, 3, 4)))
    layer.bias.copy_(mean + deviation * offset)
