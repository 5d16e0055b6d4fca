"""What a sampling shows while it runs: the predicted clip as it moves, and the time that is left.

Core's own preview is one still, of the first latent frame: beside a given first frame it never changes. This one hangs
on the MODEL as a wrapper of core's sampling, so that every sampler node shows it.
"""

import base64
import io
import time
from collections import deque

import comfy.patcher_extension
import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from .report import send_event, send_text

EVENT = "ovi-native.preview"
KEY = "ovi_preview"
FRAMES_PER_SECOND = 6  # latent frames: 24 fps, four to a latent frame
MOST_FRAMES = 16  # in a preview, evenly from the clip
REMEMBERED = 8  # steps whose mean tells how long the next ones take
QUALITY = 85  # of the JPEG


def follow(model) -> None:
    """Let every sampling with a MODEL, and with its clones, show its progress on the node that runs it."""
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, _sample)


def _sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False,
            seed=None, latent_shapes=None):
    def sample(callback):
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed,
                        latent_shapes=latent_shapes)

    context = get_executing_context()
    if context is None or callback is None:  # nobody looks: a script, or samples of a training
        return sample(callback)
    latent_format = executor.class_obj.model_patcher.model.latent_format
    node_id, clock = context.node_id, Clock(len(sigmas) - 1)

    def after_step(step, x0, x, total):  # x0, x: all streams packed in one
        callback(step, x0, x, total)
        clock.tick(step + 1)
        send_text(clock.text, node_id)
        if args.preview_method != LatentPreviewMethod.NoPreviews:
            video = comfy.utils.unpack_latents(x0, latent_shapes)[0]
            if video.ndim == 5:
                seconds = video.shape[2] / FRAMES_PER_SECOND
                send_event(EVENT, {**_place(context), "seconds": seconds, **animation(colours(video, latent_format))})

    result = sample(after_step)
    send_text(took(clock.steps, clock.elapsed, seed), node_id)
    return result


class Clock:
    """How far a sampling is, and how long the rest takes."""

    def __init__(self, steps: int, now=time.perf_counter) -> None:
        self.steps, self.done, self.now = steps, 0, now
        self.begun = now()
        self.times: deque[float] = deque([self.begun], REMEMBERED + 1)

    def tick(self, done: int) -> None:
        """After a step; `done` of them are over."""
        self.done = done
        self.times.append(self.now())

    @property
    def elapsed(self) -> float:
        return self.now() - self.begun

    @property
    def text(self) -> str:
        """The first step also loads the model, so it is left out of the mean as soon as there is another."""
        times = list(self.times)
        if len(times) > 2 and times[0] == self.begun:
            times = times[1:]
        each = (times[-1] - times[0]) / (len(times) - 1)
        left = each * (self.steps - self.done)
        return f"step {self.done} of {self.steps}, {each:.1f} s each, {minutes(left)} left"


def minutes(seconds: float) -> str:
    """Whole seconds as 2:05, or 1:02:05."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def took(steps: int, seconds: float, seed: int | None) -> str:
    """What a finished sampling was."""
    return f"{steps} {'step' if steps == 1 else 'steps'} in {minutes(seconds)}, seed {seed}"


def colours(video: Tensor, latent_format) -> Tensor:
    """Latents [B, C, T, h, w] -> RGB [n, h, w, 3] uint8 of the first clip, by the format's linear approximation."""
    frames = video.shape[2]
    count = min(frames, MOST_FRAMES)
    chosen = torch.linspace(0, frames - 1, count, device=video.device).round().long()
    factors = torch.tensor(latent_format.latent_rgb_factors, dtype=torch.float32, device=video.device)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0] * 3, device=video.device)
    rgb = torch.einsum("cnhw,cr->nhwr", video[0, :, chosen].float(), factors) + bias
    return ((rgb + 1) / 2).nan_to_num().clamp(0, 1).mul(255).to(torch.uint8).cpu()


def animation(frames: Tensor) -> dict:
    """RGB [n, h, w, 3] uint8 -> what the page plays: frames below each other in one JPEG."""
    count, height, width, _ = frames.shape
    packed = io.BytesIO()
    Image.fromarray(frames.reshape(count * height, width, 3).numpy()).save(packed, "JPEG", quality=QUALITY)
    return {"sheet": base64.b64encode(packed.getvalue()).decode(), "count": count, "width": width, "height": height}


def _place(context) -> dict:
    """Where the front end shows it: the node itself, or that of a subgraph."""
    progress = get_progress_state()
    shown = progress.dynprompt.get_display_node_id(context.node_id)
    return {"node": shown, "prompt_id": context.prompt_id}
