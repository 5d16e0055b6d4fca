"""The decoder before training: the linear codec itself, as far as a narrow TAEHV can hold it.

A TAEHV grows pictures by repeating each value 2x2 times, after which a convolution cannot tell the four places apart.
So the decoder counts: on the grid of latents two channels hold the column and the row, counted from 1 at the left and
the top, where core's padding with zeros shows the edge. Repeated, such a count r gives the parity of the finer grid as
r(x) - r(x - 1), 1 where x is even, and the finer count as r(x) + r(x - 1). With the parities a block chooses one of
four pictures: it adds ReLU(v_p + REACH - BARRIER * mismatch) over the places p, and only the one that matches is not 0.
The counts end at 8 latents, 128 pixels: there are no more convolutions to count with.

    level  grid       holds                              and chooses, by parity
    0      16 pixels  the latents, the clamp undone
    1      8 pixels   the latents repeated               59 principal components of 8x8 pixels of 4 frames
    2      4 pixels   32 of 8x8 pixels of 2 frames       27 of 4x4 pixels of 2 frames
    3      2 pixels   4x4 pixels of a frame              2x2 of them

What counts and tells parities is left alone in training (`trainable`); the rest of the channels is free to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.taesd.taehv import apply_model_with_memblocks
from torch import nn

from .latents import FRAMES_PER_LATENT, PATCH
from .taehv import LATENT_CHANNELS, Block, Narrow

REACH, BARRIER = 1.2, 8.0  # of a picture's numbers, which are scaled to 1; of what shuts a place out
HINGE = 0.45  # of the largest value, beyond which the clamp is undone more steeply
PLACES = [(row, column) for row in range(2) for column in range(2)]
ROWS, RIDGE = 12000, 1e-4  # that a regression sees; of the squares, added to them
SIGNALS = {0: range(48, 51), 1: range(64, 69), 2: range(32, 37), 3: range(48, 51)}
"""Of each level's input: one, column's and row's count, then, but for levels 0 and 3, column's and row's parity."""
UNITS = {3: range(96, 98), 4: range(36, 40), 5: range(36, 40)}  # inner channels of a block that count


@torch.no_grad()
def start_coarse(network: Narrow, clips: Clips) -> None:
    """Write the weights of levels 0 and 1 into the network's decoder, which must have its default widths."""
    d, x = network.decoder, clips.raw
    for block in (layer for layer in d if isinstance(layer, Block)):
        block.conv[4].weight.zero_()
    _undo_clamp(d, _run(d[:1], x), clips.whitened)
    _count(d)
    x = _run(d[:7], x)
    d[7].conv.weight[:, :, 0, 0] = torch.eye(80)
    _carry(d[8], range(48), SIGNALS[0], SIGNALS[1])
    d[8].weight[48:64, 51:].normal_(std=0.05)
    _choose(d[9:12], _run(d[8:9], x), range(48), clips.parts.of(clips.pixels), SIGNALS[1], 69)


@torch.no_grad()
def start_fine(network: Narrow, clips: Clips) -> None:
    """The weights of levels 2 and 3, for what levels 0 and 1 give by now."""
    d, x = network.decoder, _run(network.decoder[:12], clips.raw)
    eights = quarters(clips.pixels)
    fours = quarters(eights.unflatten(4, (2, 2)).movedim(4, 2).flatten(1, 2))
    d[13].conv.weight.zero_()
    for half in range(2):
        pictures = eights.unflatten(4, (2, 2))[:, :, :, :, half].flatten(4)
        _tell(d[13].conv, 48 * half, x, [*range(64), *range(69, 128)], components(pictures, 32).of_flat(pictures),
              SIGNALS[1])
    _carry(d[14], range(32), range(32, 35), SIGNALS[2])
    x = _run(d[12:15], x)
    _choose(d[15:18], x, range(32), components(fours.flatten(4), 27).of_flat(fours.flatten(4)), SIGNALS[2], 37)
    x = _run(d[15:18], x)
    d[19].conv.weight.zero_()
    for frame in range(2):
        _tell(d[19].conv, 56 * frame, x, range(37, 64), fours[:, :, :, :, frame].flatten(4), SIGNALS[2], 0.0)
    _place_pixels(d[20], d[22])


def coarse_loss(network: Narrow, parts: Parts, raw: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Mean square error in pixels of what level 1 tells, three times where things move.

    raw: [B, 48, T, h, w]; pictures: [B, T, h, w, 4, 16, 16, 3].
    """
    x = apply_model_with_memblocks(network.decoder[:12], raw.transpose(1, 2), True, False)
    found, eights = x[:, :, 69:].movedim(2, -1) - REACH, quarters(pictures)
    moving = (eights - eights.mean(1, keepdim=True)).abs().flatten(4).mean(-1, keepdim=True) > 0.01
    error = (found - parts.of_flat(eights.flatten(4))) * parts.scale
    return ((1 + 2 * moving) * error.square()).sum(-1).mean() / eights[0, 0, 0, 0].numel()


def trainable(network: Narrow) -> dict[str, torch.Tensor]:
    """Of each parameter of the decoder, by its name there, where training may change it."""
    masks = {name: torch.ones_like(value) for name, value in network.decoder.named_parameters()}
    for index, layer in enumerate(network.decoder):
        level = sum(index > last for last in (6, 12, 18))
        if isinstance(layer, Block):
            _leave_block(masks, index, list(SIGNALS[level]))
    for index, made, read in ((1, SIGNALS[0], ()), (8, SIGNALS[1], SIGNALS[0]), (14, SIGNALS[2], range(32, 35)),
                              (20, (), SIGNALS[3])):
        masks[f"{index}.weight"][list(made)] = 0
        masks[f"{index}.weight"][:, list(read)] = 0
    masks["1.bias"][list(SIGNALS[0])] = 0
    for index, width, level in ((7, 80, 0), (13, 48, 1), (19, 56, 2)):
        weight, made = masks[f"{index}.conv.weight"], {0: SIGNALS[0], 1: range(32, 35), 2: SIGNALS[3]}[level]
        weight[[step * width + row for step in range(len(weight) // width) for row in made]] = 0
        weight[:, list(SIGNALS[level])[1:]] = 0
    return masks


def _leave_block(masks: dict[str, torch.Tensor], index: int, signals: list[int]) -> None:
    first, second, last = (masks[f"{index}.conv.{layer}.weight"] for layer in (0, 2, 4))
    first[:, signals + [first.shape[1] // 2 + channel for channel in signals]] = 0
    last[signals], masks[f"{index}.conv.4.bias"][signals] = 0, 0
    units = list(UNITS.get(index, ()))
    first[units], second[units], second[:, units], last[:, units] = 0, 0, 0, 0
    for layer in (0, 2):
        masks[f"{index}.conv.{layer}.bias"][units] = 0


def quarters(pixels: torch.Tensor) -> torch.Tensor:
    """[B, T, h, w, n, s, s, 3] -> [B, T, 2h, 2w, n, s / 2, s / 2, 3]."""
    x = pixels.unflatten(6, (2, -1)).unflatten(5, (2, -1))
    return x.permute(0, 1, 2, 5, 3, 7, 4, 6, 8, 9).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class Parts:
    """Principal components of pictures, each scaled to about -1..1."""

    mean: torch.Tensor  # [D]
    vectors: torch.Tensor  # [D, n]
    scale: torch.Tensor  # [n], in pixels

    def of_flat(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., n]."""
        return (x - self.mean) @ (self.vectors / self.scale)

    def of(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of the quarters of [B, T, h, w, n, s, s, 3]."""
        return self.of_flat(quarters(pixels).flatten(4))


def components(x: torch.Tensor, count: int) -> Parts:
    """The first principal components of x [..., D]."""
    some = x.flatten(0, -2)[::max(1, x[..., 0].numel() // 20000)]
    _, vectors = torch.linalg.eigh(torch.cov(some.T).double())
    vectors = vectors[:, -count:].flip(1).float()
    return Parts(some.mean(0), vectors, ((some - some.mean(0)) @ vectors).abs().amax(0))


class Clips:
    """What the first weights are told from: latents [B, T, 48, h, w], pictures [B, T, h, w, 4, 16, 16, 3]."""

    def __init__(self, frames: torch.Tensor, whitened: torch.Tensor, to_raw: Callable[[torch.Tensor], torch.Tensor]
                 ) -> None:
        self.whitened, self.raw = whitened.transpose(1, 2), to_raw(whitened).transpose(1, 2)
        self.pixels = pixels(frames)
        self.parts = components(quarters(self.pixels).flatten(4), 59)


def pixels(frames: torch.Tensor) -> torch.Tensor:
    """[B, 3, T, H, W] -> [B, T', h, w, 4, 16, 16, 3], as `latents.patches`."""
    x = torch.cat([frames[:, :, :1].expand(-1, -1, FRAMES_PER_LATENT - 1, -1, -1), frames], 2)
    x = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(2, (-1, FRAMES_PER_LATENT))
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1)


def _centre(layer: nn.Conv2d) -> torch.Tensor:
    """[outputs, inputs], to write on."""
    middle = layer.weight.shape[-1] // 2
    return layer.weight[:, :, middle, middle]


def _run(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """[B, T, C, h, w] -> [B, T', C', h', w']."""
    return torch.cat([apply_model_with_memblocks(layers, part, True, False) for part in x.clone().split(8)])


def _regress(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix and constant with y [..., m] ~ x [..., n] @ matrix + constant."""
    every = max(1, x[..., 0].numel() // ROWS)
    x, y = (v.flatten(0, -2)[::every].double() for v in (x, y))
    a, b = x - x.mean(0), y - y.mean(0)
    square = a.T @ a
    matrix = torch.linalg.solve(square + RIDGE * square.diagonal().clamp(min=1e-6).diag(), a.T @ b)
    return matrix.float(), (y.mean(0) - x.mean(0) @ matrix).float()


def _undo_clamp(d: nn.Sequential, clamped: torch.Tensor, z: torch.Tensor) -> None:
    """Channels 0..47 become a + b z: the clamped value, steeper beyond a hinge on each side."""
    n, one = LATENT_CHANNELS, torch.eye(LATENT_CHANNELS)
    d[1].weight[:51] = 0
    d[1].weight[:n, :, 1, 1] = one
    d[1].bias[:n], d[1].bias[n:51] = 3.0, 1.0
    u, hinge = clamped, HINGE * clamped.abs().amax((0, 1, 3, 4))
    first, second, last = (d[3].conv[layer] for layer in (0, 2, 4))
    first.weight.zero_()
    for sign, units in ((1, slice(0, n)), (-1, slice(n, 2 * n))):
        _centre(first)[units, :n] = sign * one
        first.bias[units] = -hinge - sign * 3.0
    second.weight.zero_()
    _centre(second)[:, :] = torch.eye(len(second.weight))
    for k in range(n):
        bent = [u[:, :, k], (u[:, :, k] - hinge[k]).relu(), (-u[:, :, k] - hinge[k]).relu()]
        slope = _regress(torch.stack(bent, -1), z[:, :, k, :, :, None])[0][:, 0]
        above, below = slope[1:] / slope[0]
        _centre(last)[k, k], _centre(last)[k, n + k] = above, below
        lowest = float((bent[0] + above * bent[1] + below * bent[2]).min())
        last.bias[k] = 1.15 * max(0.0, -lowest) - 3.0


def _count(d: nn.Sequential) -> None:
    """The three blocks of level 0 count 1, then 3 and 3 further columns and rows."""
    for index, units in UNITS.items():
        block, count = d[index].conv, list(units)
        moves = [(SIGNALS[0][1], (1, 0)), (SIGNALS[0][2], (0, 1))]  # channel, tap of the neighbour before
        for layer in (0, 2):
            block[layer].weight[count] = 0
            block[layer].weight[:, count if layer else list(SIGNALS[0])] = 0
        for axis, (channel, tap) in enumerate(moves):
            still = count[axis]
            _centre(block[0])[still, channel] = _centre(block[2])[still, still] = 1
            moved = count[axis - 2]
            if len(count) == 4:
                block[0].weight[(moved, channel, *tap)] = block[2].weight[(moved, moved, *tap)] = 1
                block[0].bias[moved] = block[2].bias[moved] = 1
            _centre(block[4])[channel, still] = -1
            block[4].weight[(channel, moved, *tap)] += 1
            block[4].bias[channel] = 1


def _carry(layer: nn.Conv2d, channels, signals, made) -> None:
    """After an upsampling: channels as they are, the one, finer counts, and parities; nothing else."""
    one, column, row = list(signals)[:3]
    layer.weight.zero_()
    layer.weight[list(channels), list(channels), 1, 1] = 1
    layer.weight[made[0], one, 1, 1] = 1
    for axis, (channel, tap) in enumerate(((column, (1, 0)), (row, (0, 1)))):
        for out, sign in ((made[1 + axis], 1.0), (made[3 + axis], -1.0)):
            layer.weight[out, channel, 1, 1] = 1
            layer.weight[(out, channel, *tap)] = sign


def _choose(blocks: nn.Sequential, x: torch.Tensor, source, target: torch.Tensor, signals, out: int) -> None:
    """The blocks add REACH + target [B, T, h, w, n] to the channels from `out` on.

    By parity it is told from the `source` channels and those of the three neighbours on the quarter's own side.
    """
    known, sides = [*source, signals[0]], nn.functional.pad(x[:, :, [*source, signals[0]]], (1, 1, 1, 1))
    height, width, done = x.shape[3], x.shape[4], 0
    told = []
    for row, column in PLACES:
        taps = [(1, 1), (1, 2 * column), (2 * row, 1), (2 * row, 2 * column)]
        seen = torch.cat([sides[:, :, :, down:down + height, right:right + width] for down, right in taps], 2)
        told.append((taps, *_regress(seen[:, :, :, row::2, column::2].movedim(2, -1),
                                     target[:, :, row::2, column::2])))
    for block in blocks:
        first, second, last = (block.conv[layer] for layer in (0, 2, 4))
        count = min(first.weight.shape[0] // 4, target.shape[-1] - done)
        first.weight[:4 * count] = 0
        first.weight[:, list(signals)] = 0
        first.weight[:, [len(last.weight) + signal for signal in signals]] = 0
        second.weight[:count] = 0
        for place, (taps, matrix, constant) in enumerate(told):
            units = slice(place * count, (place + 1) * count)
            for tap, weight in zip(taps, matrix[:, done:done + count].split(len(known)), strict=True):
                first.weight[(units, known, *tap)] = weight.T
            first.bias[units] = constant[done:done + count] + REACH
            for parity, odd in zip((signals[4], signals[3]), PLACES[place], strict=True):
                first.weight[units, parity, 1, 1] = -BARRIER if odd else BARRIER
                first.bias[units] -= 0.0 if odd else BARRIER
            _centre(second)[:count, units] = torch.eye(count)
        _centre(last)[out + done:out + done + count, :count] = torch.eye(count)
        done += count


def _tell(layer: nn.Conv2d, out: int, x: torch.Tensor, source, target: torch.Tensor, signals, shift: float = REACH
          ) -> None:
    """A 1x1 convolution's outputs from `out` on: the target, told from `source`, then the one and the counts."""
    matrix, constant = _regress(x[:, :, list(source)].movedim(2, -1), target)
    rows, one = slice(out, out + matrix.shape[1]), signals[0]
    layer.weight[rows, list(source), 0, 0] = matrix.T
    layer.weight[rows, one, 0, 0] = constant + shift
    for i in range(3):
        layer.weight[rows.stop + i, signals[i], 0, 0] = 1


def _place_pixels(choose: nn.Conv2d, last: nn.Conv2d) -> None:
    """2x2 of the 4x4 pixels: channel c, row, column of the shuffle from row, column, c of a frame."""
    choose.weight[:48] = 0
    choose.weight[:, list(SIGNALS[3])] = 0
    last.weight.zero_()
    last.bias.zero_()
    one, *counts = SIGNALS[3]
    for place, odds in enumerate(PLACES):
        units = slice(12 * place, 12 * place + 12)
        for pixel in range(12):
            colour, row, column = pixel // 4, pixel // 2 % 2, pixel % 2
            choose.weight[12 * place + pixel, ((2 * odds[0] + row) * 4 + 2 * odds[1] + column) * 3 + colour, 1, 1] = 1
            _centre(last)[pixel, 12 * place + pixel] = 1
        for channel, tap, odd in zip(counts, ((1, 0), (0, 1)), reversed(odds), strict=True):
            sign = -BARRIER if odd else BARRIER
            choose.weight[units, channel, 1, 1] += sign
            choose.weight[(units, channel, *tap)] -= sign
            choose.weight[units, one, 1, 1] -= 0.0 if odd else BARRIER
