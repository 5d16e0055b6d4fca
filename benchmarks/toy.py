"""A small Ovi trained on synthetic clips: a network whose predictions change over the steps as a trained one's do.

Random weights say nothing about what depends on that (step caching, guidance on part of the steps): their velocity
turns by 40 to 60 % in every one of 50 steps. After 1,200 training steps (8 minutes on one CPU thread) it is 5 %.

The data: 8 kinds of clip, each 4 waves of its own frequency and direction with a random phase. Picture and sound of a
wave share its phase, so the towers have something to tell each other, and the text names the kind.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from devlib.pack import import_pack  # noqa: E402

import_pack()

import comfy.model_management  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules.attention import attention_pytorch  # noqa: E402
from ovi_native.ovi_model.ovi.model import AUDIO_ROPE_SCALE  # noqa: E402
from tiny.checkpoint import draw_weights  # noqa: E402
from tiny.inputs import audio_length  # noqa: E402
from tiny.models import load, network  # noqa: E402
from tiny.sizes import Sizes  # noqa: E402

FRAMES, HEIGHT, WIDTH = 4, 4, 4
KINDS, WAVES, WORDS = 8, 4, 6
SIZES = Sizes(blocks=4, ffn=768)


class Clips:
    """The synthetic clips and their prompts."""

    def __init__(self, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)
        self.video, self.audio = self.normal(KINDS, WAVES, 48) / 2, self.normal(KINDS, WAVES, 20) / 2
        self.frequency, self.direction = self.normal(KINDS, WAVES) * 0.8, self.normal(KINDS, WAVES, 2) * 0.8
        self.text = self.normal(KINDS, WORDS, SIZES.text)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.random)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random clips: video [B, 48, T, H, W], audio [B, 20, A], text [B, L, C], of standard deviation about 1."""
        kind = torch.randint(0, KINDS, (count,), generator=self.random)
        phase = self.uniform(count, WAVES) * 2 * math.pi
        frequency, (down, right) = self.frequency[kind], self.direction[kind].unbind(-1)
        t, h, w, a = (torch.arange(n) for n in (FRAMES, HEIGHT, WIDTH, audio_length(FRAMES)))
        angle = (phase[..., None, None, None] + frequency[..., None, None, None] * t[:, None, None]
                 + down[..., None, None, None] * h[:, None] + right[..., None, None, None] * w)
        video = torch.einsum("bjc,bjthw->bcthw", self.video[kind], math.sqrt(2) * angle.cos())
        angle = phase[..., None] + frequency[..., None] * a * AUDIO_ROPE_SCALE
        return video, torch.einsum("bjc,bja->bca", self.audio[kind], math.sqrt(2) * angle.cos()), self.text[kind]


def small_ovi(sizes: Sizes = SIZES, seed: int = 0):
    """A random MODEL whose text is as short as its prompts: 512 tokens of padding would be most of its work."""
    patcher = load(draw_weights(sizes, seed))
    shorten_text(patcher)
    return patcher


def shorten_text(patcher) -> None:
    net = network(patcher)
    net.text_len = net.audio_model.text_len = WORDS


def calm(net) -> None:
    """Start blocks and heads near nothing, as training does: from the tests' weights it learns ten times slower."""
    with torch.no_grad():
        for tower in (net, net.audio_model):
            tower.head.head.weight.mul_(0.1)
            for block in tower.blocks:
                block.modulation.mul_(0.3)[:, [2, 5]] = 0  # the gates
                block.cross_attn.o.weight.mul_(0.3)


def loss_of(net, clips: Clips, batch: int, shifted: bool) -> torch.Tensor:
    """Mean squared error of both velocities on a batch of clips at random noise levels; 15 % without their text."""
    video, audio, text = clips.draw(batch)
    text = text * (clips.uniform(batch, 1, 1) > 0.15)
    level = clips.uniform(batch)
    level = 5 * level / (1 + 4 * level) if shifted else level
    video_noise, audio_noise = clips.normal(*video.shape), clips.normal(*audio.shape)
    noisy = [torch.lerp(clean, noise, level.view(-1, *[1] * (clean.ndim - 1)))
             for clean, noise in ((video, video_noise), (audio, audio_noise))]
    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
    found = net(noisy, level * 1000, text, options)
    return ((found[0] - video_noise + video) ** 2).mean() + ((found[1] - audio_noise + audio) ** 2).mean()


def train(patcher, steps: int, batch: int = 16) -> float:
    """Train a MODEL in place; returns the mean loss of the last 100 steps (4 at the start)."""
    net, clips, losses = network(patcher), Clips(), []
    calm(net)
    net.requires_grad_(True)
    comfy.model_management.in_training = True  # core then takes rotary embeddings that have gradients
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, steps)
    for step in range(steps):
        loss = loss_of(net, clips, batch, shifted=step % 2 == 1)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            print(f"training {step + 1} of {steps}: loss {sum(losses[-100:]) / 100:.2f}", file=sys.stderr, flush=True)
    comfy.model_management.in_training = False
    net.requires_grad_(False)
    return sum(losses[-100:]) / len(losses[-100:])


def trained_ovi(steps: int, file: Path | None = None):
    """A trained MODEL; read from `file` if it exists, else trained and written there."""
    patcher = small_ovi()
    if file is not None and file.exists():
        network(patcher).load_state_dict(torch.load(file, weights_only=True))
        return patcher
    train(patcher, steps)
    if file is not None:
        torch.save(network(patcher).state_dict(), file)
    return patcher
