"""The vocoder of the trained tiny Ovi: core's BigVGAN at a small width, taught to give sounds locked to frames.

A sound's amplitudes are powers of ten of its spectrum, which a network of sines is slow to learn. So the first residual
block begins as that power, written down (`start_with_powers`), and training starts with amplitudes at hand:

    frames, 62.5 Hz   principal components of the 80 bands, and one
    stage 0, 250 Hz   the components, one and three clocks of 2 and 4 steps; the bands u, 0..1, become about u^8
    stage 1, 1 kHz    amplitudes and clocks become tones
    stages 2 to 5     wavelets: a linear synthesis filterbank

Residual blocks are trained in the first two stages only; the later ones add nothing, and training skips them, which is
exact and several times faster.
"""

from __future__ import annotations

import math

import torch
from comfy.ldm.mmaudio.vae.bigvgan import BigVGANVocoder
from ovi_native.ovi_model.media.audio_vae import VOCODER_CONFIG

WIDTH, BANDS = 224, 80
TRAINED_BLOCKS = range(5)  # of the residual blocks, three for each stage
PARTS = 28  # principal components of a frame
ONE, CLOCKS, FIRST_BAND = PARTS, slice(PARTS + 1, PARTS + 4), PARTS + 4  # channels of stage 0
QUIETEST, LOUDEST = -5.0, 0.3  # of the spectra, where u is 0 and 1
BEND = 0.7  # largest argument of the sine that squares
DAUBECHIES = (0.4829629131445341, 0.8365163037378079, 0.2241438680420134, -0.1294095225512604)
LINEAR = -6.0  # log of a snake's frequency at which it bends nothing
WINDOW = 256  # samples in which an error is told from the loudness there
FLOOR, SHARE = 1e-5, 1e-2  # of the power in a window, to which is added a share of that of the clip
EDGE = 1024  # samples at either end of a crop, which depend on what is cut off


class Vocoder(BigVGANVocoder):
    """Core's vocoder, of whose residual blocks only a few are trained; the others pass their input on."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__({**VOCODER_CONFIG, "num_mels": 80, "upsample_initial_channel": width})
        for name, parameter in self.named_parameters():
            if parameter.ndim == 3:
                fan = parameter.shape[0] * 2 if name.startswith("ups.") else parameter[0].numel()
                torch.nn.init.normal_(parameter, std=(0.3 if ".convs2." in name else 1.0) * fan**-0.5)
            else:
                torch.nn.init.zeros_(parameter)
        for index, block in enumerate(self.resblocks):
            if index not in TRAINED_BLOCKS:
                block.requires_grad_(False)
                for parameter in block.convs2.parameters():
                    torch.nn.init.zeros_(parameter)
        self.activation_post.requires_grad_(False)
        with torch.no_grad():  # spectra lie about -3.5, with a deviation of 1
            self.conv_pre.weight.mul_(0.7)
            self.conv_pre.bias.copy_(3.5 * self.conv_pre.weight.sum((1, 2)) + 0.5 * torch.randn(width))
            self.activation_post.act.alpha.fill_(LINEAR)
            self.conv_post.weight.mul_(0.02)
            self._start_as_wavelets()

    def _start_as_wavelets(self) -> None:
        """Make the later stages synthesise: trees of wavelet packets, of which each step merges two bands."""
        low = torch.tensor(DAUBECHIES)
        high = low.flip(0) * torch.tensor([1.0, -1.0, 1.0, -1.0])
        for (up,) in self.ups[2:]:
            up.weight.mul_(0.02)
            for channel in range(up.weight.shape[0] // 2):
                up.weight[2 * channel, channel] += low
                up.weight[2 * channel + 1, channel] += high

    @torch.no_grad()
    def start_with_powers(self, mel: torch.Tensor) -> None:
        """Write the first stages' weights for spectra like `mel` [n, 80, T]."""
        frames = mel.movedim(1, -1).flatten(0, 1)
        mean = frames.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(frames.T.double()))
        deviations = values[-PARTS:].clamp(min=1e-6).sqrt()
        analysis = (vectors[:, -PARTS:] / deviations).float().T
        synthesis = (vectors[:, -PARTS:] * deviations).float() / (LOUDEST - QUIETEST)
        bands = torch.cat([synthesis, ((mean - QUIETEST) / (LOUDEST - QUIETEST))[:, None]], 1)  # of components and one
        self._analyse(analysis, mean)
        for block in self.resblocks[:3]:
            for activation in block.activations[::2]:
                activation.act.alpha[:FIRST_BAND] = activation.act.beta[:FIRST_BAND] = LINEAR
        self._raise(self.resblocks[0], bands)
        up = self.ups[1][0].weight
        mixed = 0.3 * torch.randn(BANDS, *up.shape[1:])
        up.zero_()
        up[FIRST_BAND:] = 3 * mixed  # the mean of three blocks, of which one has what is mixed here
        up[:ONE + 1] = -torch.einsum("bc,bok->cok", bands, mixed)
        up[CLOCKS] = 0.05 * torch.randn(3, *up.shape[1:])
        for block in self.resblocks[1:6]:
            for convolution in block.convs2:
                convolution.weight.mul_(0.3)

    def _analyse(self, analysis: torch.Tensor, mean: torch.Tensor) -> None:
        """Components and one for each frame, drawn out over its four steps; clocks that turn with the steps."""
        pre, up, steps = self.conv_pre, self.ups[0][0], torch.arange(8)
        pre.weight[:ONE + 1] = 0
        pre.weight[:PARTS, :, 3] = analysis
        pre.bias[:PARTS], pre.bias[ONE] = -analysis @ mean, 1
        slope = torch.tensor([1, 3, 5, 7, 7, 5, 3, 1]) / 8
        up.weight.mul_(0.03)
        up.weight[:, :FIRST_BAND] = 0
        for channel in range(ONE + 1):
            up.weight[channel, channel] = slope
        turns = (torch.cos(math.pi * steps), torch.cos(math.pi * steps / 2), torch.sin(math.pi * steps / 2))
        up.weight[ONE, CLOCKS] = torch.stack(turns) * slope

    @staticmethod
    def _raise(block: torch.nn.Module, bands: torch.Tensor) -> None:
        """Bands u, told from components and one, become u plus about u^8; nothing else changes.

        A snake adds to its argument about the square of it. Each pair of convolutions takes the argument off again,
        which is u at first and then what the pair before has squared.
        """
        own = torch.eye(BANDS)
        for pair, (taken, given) in enumerate(((0, 1), (1, -1), (-1, 1))):
            still, bent = (block.activations[2 * pair + i].act for i in range(2))
            still.alpha[FIRST_BAND:] = still.beta[FIRST_BAND:] = LINEAR
            bent.alpha[FIRST_BAND:], bent.beta[FIRST_BAND:] = math.log(BEND), 2 * math.log(math.sin(BEND))
            before, after = block.convs1[pair].weight, block.convs2[pair].weight
            before.zero_()
            after.zero_()
            centre = before.shape[2] // 2
            before[FIRST_BAND:, :ONE + 1, centre] = bands * (-taken if taken else 1)
            before[FIRST_BAND:, FIRST_BAND:, centre] = taken * own
            after[FIRST_BAND:, FIRST_BAND:, after.shape[2] // 2] = given * own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As core's, without the blocks that add nothing: mel [B, 80, T] -> [B, 1, 256 T]."""
        x = self.conv_pre(x)
        for stage, (up,) in enumerate(self.ups):
            x = up(x)
            first = stage * self.num_kernels
            trained = [self.resblocks[i] for i in range(first, first + self.num_kernels) if i in TRAINED_BLOCKS]
            if trained:
                x = (sum(block(x) for block in trained) + (self.num_kernels - len(trained)) * x) / self.num_kernels
        return torch.tanh(self.conv_post(self.activation_post(x)))


def vocoder_loss(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Samples [B, N]: the share of all power that is wrong, and the mean share of the amplitude in every window."""
    error = made - wanted
    powers = [x[:, EDGE:-EDGE].unfold(-1, WINDOW, WINDOW // 2).square().mean(-1) for x in (error, wanted)]
    shares = powers[0] / (powers[1] + SHARE * powers[1].mean(-1, keepdim=True) + FLOOR)
    return error.square().sum() / (wanted.square().sum() + 1) + (shares + 1e-2).sqrt().mean()


def vocoder_tensors(vocoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As published: each kernel as directions and their lengths; what is all zero has a direction too."""
    out = {}
    for name, value in vocoder.state_dict().items():
        if name.endswith("weight"):
            length = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
            directions = torch.where(length > 0, value / length.clamp(min=1e-12), torch.ones(()))
            out[f"{name}_g"], out[f"{name}_v"] = length, directions
        else:
            out[name] = value.contiguous()
    return out
