"""A slow float64 model of Ovi, written from the facts in the reference numbers' README and from the papers alone.

Pure torch, no ComfyUI, none of the pack's code: whatever both get wrong must be wrong twice. Explicit complex rotary
products, a loop over heads, per-token modulation tables, no caching. One sample at a time: video [48, T, H, W], audio
[20, A], text [n, C]. Weights are a dictionary under the reference's names (`video_model.*`, `audio_model.*`).

Odd latent heights and widths never occur in the reference, whose sizes are multiples of 32 pixels. ComfyUI pads them to
a whole patch by wrapping around (the added last row is a copy of the first) and crops the result; so does the oracle.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6
TEXT_LENGTH = 512
AUDIO_SCALE = 0.19676
TIME_PAIRS, SPACE_PAIRS = 22, 21

Weights = dict[str, Tensor]


# --- layers -----------------------------------------------------------------------------------------------------------

def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def affine_layer_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return layer_norm(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(128)) v for each head of 128 channels; q [N, D], k and v [M, D]."""
    out = torch.empty_like(q)
    for start in range(0, q.shape[1], 128):
        part = slice(start, start + 128)
        scores = q[:, part] @ k[:, part].T / math.sqrt(128)
        weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        out[:, part] = (weights / weights.sum(dim=1, keepdim=True)) @ v[:, part]
    return out


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Width-7 convolution over time, zeros outside; x [A, in], kernel [out, in, 7]."""
    length, half = x.shape[0], kernel.shape[2] // 2
    out = torch.zeros(length, kernel.shape[0], dtype=x.dtype)
    for i in range(length):
        for tap in range(kernel.shape[2]):
            if 0 <= i + tap - half < length:
                out[i] += kernel[:, :, tap] @ x[i + tap - half]
    return out if bias is None else out + bias


# --- time and position ------------------------------------------------------------------------------------------------

def sinusoids(t: float, width: int) -> Tensor:
    angles = [t * 10000 ** (-i / (width // 2)) for i in range(width // 2)]
    return torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)


def radians(pairs: int) -> list[float]:
    """Angle of each rotary pair at position 1, for an axis that has `pairs` pairs."""
    return [10000 ** (-2 * i / (2 * pairs)) for i in range(pairs)]


def video_angles(frames: int, rows: int, columns: int, first: int = 0) -> Tensor:
    """[tokens, 64] angles, tokens ordered time, then row, then column."""
    table = [[t * r for r in radians(TIME_PAIRS)] + [h * r for r in radians(SPACE_PAIRS)]
             + [w * r for r in radians(SPACE_PAIRS)]
             for t in range(first, first + frames) for h in range(rows) for w in range(columns)]
    return torch.tensor(table, dtype=torch.float64)


def audio_angles(length: int, first: int = 0) -> Tensor:
    """[tokens, 64]: the temporal pairs at scaled positions, the other 42 pairs not rotated."""
    table = [[a * AUDIO_SCALE * r for r in radians(TIME_PAIRS)] + [0.0] * (2 * SPACE_PAIRS)
             for a in range(first, first + length)]
    return torch.tensor(table, dtype=torch.float64)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn adjacent channel pairs (2i, 2i + 1) of every head of x [N, D] as complex numbers."""
    n, width = x.shape
    pairs = torch.complex(x[:, 0::2].contiguous(), x[:, 1::2].contiguous()).reshape(n, width // 128, 64)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    return torch.stack([turned.real, turned.imag], dim=-1).reshape(n, width)


# --- the fused model --------------------------------------------------------------------------------------------------

@dataclass
class Tower:
    """One stream on its way through the blocks."""

    w: Weights
    name: str
    x: Tensor  # [N, D] residual
    angles: Tensor  # [N, 64]
    text: Tensor  # [512, D]
    time: Tensor  # [N, D] time embedding of every token
    projected: Tensor  # [N, 6, D]

    def table(self, block: int) -> Tensor:
        """Six modulation vectors for every token [N, 6, D]."""
        return self.w[f"{self.name}.blocks.{block}.modulation.modulation"] + self.projected

    def attend_self(self, block: int) -> None:
        at = f"{self.name}.blocks.{block}.self_attn"
        shift, scale, gate = self.table(block).unbind(1)[:3]
        y = layer_norm(self.x) * (1 + scale) + shift
        q = rotate(rms_norm(self.w, f"{at}.norm_q", linear(self.w, f"{at}.q", y)), self.angles)
        k = rotate(rms_norm(self.w, f"{at}.norm_k", linear(self.w, f"{at}.k", y)), self.angles)
        y = attention(q, k, linear(self.w, f"{at}.v", y))
        self.x = self.x + gate * linear(self.w, f"{at}.o", y)

    def attend_others_and_feed_forward(self, block: int, other: Tensor | None, other_angles: Tensor | None) -> None:
        at = f"{self.name}.blocks.{block}.cross_attn"
        y = affine_layer_norm(self.w, f"{self.name}.blocks.{block}.norm3", self.x)
        q = rms_norm(self.w, f"{at}.norm_q", linear(self.w, f"{at}.q", y))
        k = rms_norm(self.w, f"{at}.norm_k", linear(self.w, f"{at}.k", self.text))
        out = attention(q, k, linear(self.w, f"{at}.v", self.text))
        if other is not None:
            other = affine_layer_norm(self.w, f"{at}.pre_attn_norm_fusion", other)
            k = rms_norm(self.w, f"{at}.norm_k_fusion", linear(self.w, f"{at}.k_fusion", other))
            out = out + attention(rotate(q, self.angles), rotate(k, other_angles),
                                  linear(self.w, f"{at}.v_fusion", other))
        self.x = self.x + linear(self.w, f"{at}.o", out)

        at = f"{self.name}.blocks.{block}.ffn"
        shift, scale, gate = self.table(block).unbind(1)[3:]
        y = layer_norm(self.x) * (1 + scale) + shift
        self.x = self.x + gate * linear(self.w, f"{at}.2", gelu_tanh(linear(self.w, f"{at}.0", y)))

    def head(self) -> Tensor:
        table = self.w[f"{self.name}.head.modulation"][0] + self.time[:, None, :]  # [N, 2, D]
        y = layer_norm(self.x) * (1 + table[:, 1]) + table[:, 0]
        return linear(self.w, f"{self.name}.head.head", y)


def make_tower(w: Weights, name: str, x: Tensor, angles: Tensor, text: Tensor, times: list[float]) -> Tower:
    """times: one per token. Text is padded with zero rows before its MLP, and the padding is attended like text."""
    padded = torch.zeros(TEXT_LENGTH, text.shape[1], dtype=torch.float64)
    padded[:text.shape[0]] = text
    embedded = linear(w, f"{name}.text_embedding.2", gelu_tanh(linear(w, f"{name}.text_embedding.0", padded)))
    width = w[f"{name}.time_embedding.0.weight"].shape[1]
    table = torch.stack([sinusoids(t, width) for t in times])
    time = linear(w, f"{name}.time_embedding.2", silu(linear(w, f"{name}.time_embedding.0", table)))
    projected = linear(w, f"{name}.time_projection.1", silu(time)).reshape(len(times), 6, -1)
    return Tower(w, name, x, angles, embedded, time, projected)


def embed_video(w: Weights, video: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches of 1 x 2 x 2 as tokens [N, D], and how many there are along time, height and width."""
    frames, height, width = video.shape[1:]
    rows, columns = (height + 1) // 2, (width + 1) // 2
    kernel, bias = w["video_model.patch_embedding.weight"][:, :, 0], w["video_model.patch_embedding.bias"]
    tokens = []
    for t in range(frames):
        for r in range(rows):
            for c in range(columns):
                value = bias.clone()
                for dy in range(2):
                    for dx in range(2):
                        pixel = video[:, t, (2 * r + dy) % height, (2 * c + dx) % width]  # odd sizes wrap around
                        value = value + kernel[:, :, dy, dx] @ pixel
                tokens.append(value)
    return torch.stack(tokens), (frames, rows, columns)


def embed_audio(w: Weights, audio: Tensor) -> Tensor:
    at = "audio_model.patch_embedding"
    x = silu(convolve(audio.T, w[f"{at}.0.weight"], w[f"{at}.0.bias"]))
    gated = silu(convolve(x, w[f"{at}.2.w1.weight"])) * convolve(x, w[f"{at}.2.w3.weight"])
    return convolve(gated, w[f"{at}.2.w2.weight"])


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], height: int, width: int) -> Tensor:
    """[N, 4 * 48] -> [48, T, height, width]; the last axis is row, column, channel (channel fastest)."""
    frames, rows, columns = grid
    out = torch.zeros(48, frames, 2 * rows, 2 * columns, dtype=torch.float64)
    values = tokens.reshape(frames, rows, columns, 2, 2, 48)
    for dy in range(2):
        for dx in range(2):
            out[:, :, dy::2, dx::2] = values[:, :, :, dy, dx].permute(3, 0, 1, 2)
    return out[:, :, :height, :width]


def forward(weights: Weights, video: Tensor | None, audio: Tensor | None, t: float, video_text: Tensor | None = None,
            audio_text: Tensor | None = None, clean_first_frame: bool = False, skip_layer: int = -1,
            first: tuple[int, int] = (0, 0)):
    """Predicted velocities (video [48, T, H, W] or None, audio [20, A] or None) at timestep t on the 0..1000 scale.

    clean_first_frame: tokens of latent frame 0 get timestep 0. skip_layer: a block neither tower runs (joint only).
    first: the number of the first video frame and of the first audio latent, when they are a part of a longer clip.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    v = a = None
    if video is not None:
        tokens, grid = embed_video(w, video.double())
        per_frame = grid[1] * grid[2]
        times = [0.0 if clean_first_frame and i < per_frame else float(t) for i in range(len(tokens))]
        v = make_tower(w, "video_model", tokens, video_angles(*grid, first[0]), video_text.double(), times)
    if audio is not None:
        tokens = embed_audio(w, audio.double())
        times = [float(t)] * len(tokens)
        a = make_tower(w, "audio_model", tokens, audio_angles(len(tokens), first[1]), audio_text.double(), times)
    towers = [tower for tower in (v, a) if tower is not None]

    blocks = 1 + max(int(name.split(".")[2]) for name in w if ".blocks." in name)
    for block in range(blocks):
        if len(towers) == 2 and block == skip_layer:
            continue
        for tower in towers:
            tower.attend_self(block)
        before = {tower.name: (tower.x, tower.angles) for tower in towers}  # what the other stream may read
        for tower in towers:
            others = [before[other.name] for other in towers if other is not tower]
            tower.attend_others_and_feed_forward(block, *(others[0] if others else (None, None)))

    return (None if v is None else unpatchify(v.head(), grid, *video.shape[2:]), None if a is None else a.head().T)


# --- schedules --------------------------------------------------------------------------------------------------------

def shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def schedule(solver: str, steps: int, shift: float) -> tuple[list[float], list[float]]:
    """(sigmas with the final 0, timesteps fed to the network)."""
    if solver == "euler":
        last = shifted(1 / 1000, shift)  # the lower end is shifted here and once more below
        levels = [1.0 + (last - 1.0) * i / max(steps - 1, 1) for i in range(steps)]
        sigmas = [shifted(level, shift) for level in levels]
        return [*sigmas, 0.0], [1000 * s for s in sigmas]
    top = 1 - 1 / 1000 if solver == "unipc" else 1.0
    top = float(torch.tensor(top, dtype=torch.float32))
    # As numpy.linspace rounds: at whole timesteps the last bit decides what truncation leaves, 500 or 499.
    sigmas = [shifted(i * (-top / steps) + top, shift) for i in range(steps)]
    return [*sigmas, 0.0], [float(int(1000 * s)) for s in sigmas]


# --- solvers ----------------------------------------------------------------------------------------------------------
# A velocity v at (x, sigma) gives the clean estimate x - sigma v; alpha = 1 - sigma, lambda = log(alpha / sigma).
# `before` edits the state in front of every step.

def unchanged(x: Tensor) -> Tensor:
    return x


def lam(sigma: float) -> float:
    if sigma <= 0:
        return math.inf
    return -math.inf if sigma >= 1 else math.log((1 - sigma) / sigma)


def euler(velocity: Callable, x, sigmas, times, before: Callable = unchanged):
    for i in range(len(times)):
        x = before(x)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, times[i])
    return x


def dpmpp(velocity: Callable, x, sigmas, times, before: Callable = unchanged):
    """2M, midpoint (arXiv 2211.01095, algorithm 2), with first-order first and last steps."""
    previous = None
    for i in range(len(times)):
        x, s, n = before(x), sigmas[i], sigmas[i + 1]
        clean = x - s * velocity(x, times[i])
        if n == 0:
            x, previous = clean, (s, clean)
            continue
        h = lam(n) - lam(s)
        decay = math.exp(-h) if math.isfinite(h) else 0.0
        target = clean
        if previous is not None and math.isfinite(lam(previous[0])):
            r = (lam(s) - lam(previous[0])) / h
            target = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * previous[1]
        x, previous = n / s * x + (1 - n) * (1 - decay) * target, (s, clean)
    return x


def unipc(velocity: Callable, x, sigmas, times, before: Callable = unchanged):
    """UniPC (arXiv 2302.04867) predicting the clean signal, B(h) = e^h - 1, order 2, corrector after the first step.

    Coefficients come from solving the paper's Vandermonde systems with torch.linalg rather than from closed forms.
    """
    history: list[tuple[float, Tensor]] = []  # (sigma, clean), newest last
    last_x = last_order = None
    for i in range(len(times)):
        x, s = before(x), sigmas[i]
        clean = x - s * velocity(x, times[i])
        if i > 0:
            points = history[-last_order:]
            x = unipc_step(last_x, points, s, corrector=clean)
        history.append((s, clean))
        last_order = min(2, len(times) - i, len(history))
        last_x = x
        x = unipc_step(x, history[-last_order:], sigmas[i + 1], corrector=None)
    return x


def unipc_step(x, points: list[tuple[float, Tensor]], target: float, corrector):
    """From the newest of `points` to noise level `target`; older points and a corrector's estimate raise the order."""
    s, clean = points[-1]
    if target == 0:
        return clean
    h = lam(target) - lam(s)
    base = target / s * x - (1 - target) * math.expm1(-h) * clean
    nodes = [((lam(old) - lam(s)) / h, value - clean) for old, value in points[:-1]]
    if corrector is not None:
        nodes.append((1.0, corrector - clean))
    if not nodes:
        return base
    count = len(nodes)
    bh = math.expm1(-h)
    right, phi, factorial = [], bh / -h - 1, 1
    for k in range(1, count + 1):
        right.append(phi * factorial / bh)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    if corrector is None or count == 1:
        rhos = [0.5] * count  # the published shortcut for one unknown
    else:
        matrix = torch.tensor([[r**k for r, _ in nodes] for k in range(count)], dtype=torch.float64)
        rhos = torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()
    for rho, (r, difference) in zip(rhos, nodes, strict=True):
        base = base - (1 - target) * bh * rho * difference / r
    return base


SOLVERS = {"unipc": unipc, "dpm++": dpmpp, "euler": euler}


# --- guidance and the whole loop --------------------------------------------------------------------------------------

def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    return negative + scale * (positive - negative)


def sample(model: Callable, video: Tensor, audio: Tensor, solver: str, steps: int, shift: float, video_scale: float,
           audio_scale: float, first_frame: Tensor | None = None):
    """The reference's loop. `model(video, audio, t, negative)` predicts both velocities; video and audio are noise.

    first_frame [48, 1, H, W] is written over latent frame 0 before every step and after the last one; the solver's
    own history is left as it is.
    """
    sigmas, times = schedule(solver, steps, shift)
    shape, split = video.shape, video.numel()

    def put_first_frame(x: Tensor) -> Tensor:
        v = x[:split].reshape(shape).clone()
        if first_frame is not None:
            v[:, :1] = first_frame
        return torch.cat([v.flatten(), x[split:]])

    def velocity(x: Tensor, t: float) -> Tensor:
        v, a = x[:split].reshape(shape), x[split:].reshape(audio.shape)
        positive, negative = model(v, a, t, False), model(v, a, t, True)
        return torch.cat([guided(positive[0], negative[0], video_scale).flatten(),
                          guided(positive[1], negative[1], audio_scale).flatten()])

    x = torch.cat([video.double().flatten(), audio.double().flatten()])
    x = put_first_frame(SOLVERS[solver](velocity, x, sigmas, times, before=put_first_frame))
    return x[:split].reshape(shape), x[split:].reshape(audio.shape)
