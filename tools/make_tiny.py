"""Write the tiny model bundle: small random-weight files in the public upstream layouts.

The bundle lets the whole pipeline (loaders, sampler, decoders) run anywhere in seconds. Its output is noise with
noise for sound; no file in it comes from a trained checkpoint. Five files go into ComfyUI's own model folders:

    diffusion_models/ovi_tiny_random.safetensors            joint checkpoint, `video_model.*` and `audio_model.*`
    text_encoders/ovi_tiny_random_umt5.safetensors          UMT5 in ComfyUI's layout, tokenizer inside
    vae/ovi_tiny_random_taew2_2.safetensors                 48-channel TAEHV, stands in for the Wan2.2 VAE
    vae/ovi_tiny_random_mmaudio_vae.safetensors             MMAudio 16 kHz VAE, raw upstream names
    vae/ovi_tiny_random_mmaudio_vocoder.safetensors         BigVGAN vocoder, raw upstream names with weight norm

Every number comes from the seed and the tensor's name alone, as uniform draws, so that the bytes do not depend on the
machine or on the order of generation. Needs torch and sentencepiece (both are ComfyUI requirements).

    python tools/make_tiny.py MODELS_DIR [--seed 0] [--force]
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from devlib.pack import standalone

VERSION = "1"  # bump when the contents change, so that bundles written earlier are replaced

Tensors = dict[str, torch.Tensor]

safetensors_chunks = standalone("files.safetensors_file").safetensors_chunks
read_metadata = standalone("files.safetensors_header").read_metadata
write_atomically = standalone("files.disk").write_atomically


class Weights:
    """Collects named tensors drawn from the seed; `std` is the standard deviation of the uniform draw."""

    def __init__(self, seed: int, part: str, dtype: torch.dtype) -> None:
        self.salt = f"ovi-tiny/{seed}/{part}/"
        self.dtype = dtype
        self.tensors: Tensors = {}

    def draw(self, name: str, *shape: int) -> torch.Tensor:
        """Uniform numbers of variance 1, a function of the salt and the name."""
        generator = torch.Generator().manual_seed(zlib.crc32((self.salt + name).encode()))
        return (torch.rand(shape, generator=generator) * 2 - 1) * math.sqrt(3)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Stores a value in the file's dtype."""
        self.tensors[name] = value.to(self.dtype).contiguous()

    def random(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        """Stores a draw around `mean`."""
        self.put(name, self.draw(name, *shape) * std + mean)

    def kernel(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Stores a matrix or kernel [out, in, ...] that keeps the variance of its input, times gain squared."""
        self.random(name, *shape, std=gain / math.sqrt(math.prod(shape[1:])))

    def layer(self, name: str, *shape: int, gain: float = 1.0, bias_std: float = 0.1) -> None:
        """Stores a kernel and its bias."""
        self.kernel(f"{name}.weight", *shape, gain=gain)
        self.random(f"{name}.bias", shape[0], std=bias_std)


# --- the joint checkpoint ---------------------------------------------------------------------------------------------

DIM, HEAD_COUNT, BLOCKS, FFN, FREQ_DIM, TEXT_DIM = 256, 2, 4, 512, 256, 128
VIDEO_CHANNELS, AUDIO_CHANNELS, AUDIO_KERNEL = 48, 20, 7
AUDIO_MLP_MULTIPLE = 256


def ovi_checkpoint(seed: int) -> Tensors:
    """The twin towers under upstream's names, heads of 128 as in the real model."""
    w = Weights(seed, "ovi", torch.bfloat16)
    for tower in ("video_model", "audio_model"):
        w.layer(f"{tower}.text_embedding.0", DIM, TEXT_DIM, gain=2.0, bias_std=0.02)  # padding rows stay quiet
        w.layer(f"{tower}.text_embedding.2", DIM, DIM, gain=2.0, bias_std=0.02)
        w.layer(f"{tower}.time_embedding.0", DIM, FREQ_DIM)
        w.layer(f"{tower}.time_embedding.2", DIM, DIM)
        w.layer(f"{tower}.time_projection.1", 6 * DIM, DIM, gain=0.7)
        for block in range(BLOCKS):
            _ovi_block(w, f"{tower}.blocks.{block}")
        w.random(f"{tower}.head.modulation", 1, 2, DIM, std=0.3)
    w.layer("video_model.patch_embedding", DIM, VIDEO_CHANNELS, 1, 2, 2)
    w.layer("video_model.head.head", 4 * VIDEO_CHANNELS, DIM, gain=0.6, bias_std=0.02)
    w.layer("audio_model.patch_embedding.0", DIM, AUDIO_CHANNELS, AUDIO_KERNEL)
    hidden = _round_up(int(2 * 4 * DIM / 3), AUDIO_MLP_MULTIPLE)
    w.kernel("audio_model.patch_embedding.2.w1.weight", hidden, DIM, AUDIO_KERNEL)
    w.kernel("audio_model.patch_embedding.2.w2.weight", DIM, hidden, AUDIO_KERNEL, gain=2.0)
    w.kernel("audio_model.patch_embedding.2.w3.weight", hidden, DIM, AUDIO_KERNEL)
    w.layer("audio_model.head.head", AUDIO_CHANNELS, DIM, gain=0.6, bias_std=0.02)
    return w.tensors


def _ovi_block(w: Weights, block: str) -> None:
    for name in ("q", "k", "v", "o"):
        w.layer(f"{block}.self_attn.{name}", DIM, DIM)
    for name in ("q", "k", "v", "o", "k_fusion", "v_fusion"):
        w.layer(f"{block}.cross_attn.{name}", DIM, DIM, gain=2.0 if name == "v" else 1.0)
    for name in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"):
        w.random(f"{block}.{name}.weight", DIM, mean=1.0, std=0.25)
    w.random(f"{block}.cross_attn.norm_k_fusion.weight", DIM, mean=1.0, std=0.25)
    for name in ("norm3", "cross_attn.pre_attn_norm_fusion"):
        w.random(f"{block}.{name}.weight", DIM, mean=1.0, std=0.25)
        w.random(f"{block}.{name}.bias", DIM, std=0.1)
    w.layer(f"{block}.ffn.0", FFN, DIM)
    w.layer(f"{block}.ffn.2", DIM, FFN)
    w.random(f"{block}.modulation.modulation", 1, 6, DIM, std=0.3)


def _round_up(value: int, multiple: int) -> int:
    return multiple * math.ceil(value / multiple)


# --- the text encoder -------------------------------------------------------------------------------------------------

TEXT_LAYERS, TEXT_HEADS, TEXT_HEAD_DIM, TEXT_FFN, BUCKETS = 2, 2, 64, 256, 32
PIECES = 768

CORPUS = """\
A wide shot of a quiet harbour at dawn, fishing boats rocking on grey water while gulls circle above the pier.
The camera moves slowly forward. A woman in a red coat turns, smiles and says: <S>We were right about the weather.<E>
Two men sit at a small kitchen table. The older man lowers his cup. <S>You never told me that before.<E>
He answers in a low voice, <S>You never asked me, did you?<E> The younger man looks down at the floor.
<AUDCAP>Gentle waves, distant gulls, a clear female voice speaking with mild amusement.<ENDAUDCAP>
<AUDCAP>Rain on a tin roof, thunder far away, a radio playing soft piano music, footsteps.<ENDAUDCAP>
Audio: a loud crowd cheering in a stadium, a whistle, an announcer shouting over the noise.
Audio: birds, wind in dry grass, then a dog barking twice and a door closing with a heavy sound.
A close-up of hands playing an old guitar by a camp fire; sparks rise into the dark sky full of stars.
A robot with a bright yellow face walks through a busy market (at 3:30) and buys 12 oranges, 45 apples & 678 plums!
The singer stands on a stage under blue light, holding the microphone, and sings: <S>Hold on, hold on to me.<E>
An astronaut on the moon picks up a stone, looks at the Earth, and breathes heavily inside the helmet.
jitter, bad hands, blur, distortion, robotic, muffled, echo, distorted, low quality, watermark, text, still picture
The old clock in the hall strikes nine; its pendulum swings "left" and 'right' \\ under a dusty glass case.
In slow motion, a white horse gallops along the beach, water splashing high, mane flying, sun low behind it.
"""


def tokenizer_model() -> bytes:
    """A sentencepiece model trained on CORPUS, with UMT5's pad 0 and end 1; bytes cover every other character."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()), model_writer=model, model_type="bpe", vocab_size=PIECES,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )
    return model.getvalue()


def text_encoder(seed: int) -> Tensors:
    """UMT5 under ComfyUI's names: a relative position table in every layer, gated feed-forward."""
    w = Weights(seed, "umt5", torch.float16)
    inner = TEXT_HEADS * TEXT_HEAD_DIM
    w.random("shared.weight", _round_up(PIECES, 64), TEXT_DIM, std=1.0)
    for index in range(TEXT_LAYERS):
        block = f"encoder.block.{index}"
        attention = f"{block}.layer.0.SelfAttention"
        w.kernel(f"{attention}.q.weight", inner, TEXT_DIM, gain=1 / math.sqrt(TEXT_HEAD_DIM))  # T5 has no 1/sqrt(d)
        w.kernel(f"{attention}.k.weight", inner, TEXT_DIM)
        w.kernel(f"{attention}.v.weight", inner, TEXT_DIM)
        w.kernel(f"{attention}.o.weight", TEXT_DIM, inner)
        w.random(f"{attention}.relative_attention_bias.weight", BUCKETS, TEXT_HEADS, std=0.5)
        w.random(f"{block}.layer.0.layer_norm.weight", TEXT_DIM, mean=1.0, std=0.1)
        w.kernel(f"{block}.layer.1.DenseReluDense.wi_0.weight", TEXT_FFN, TEXT_DIM)
        w.kernel(f"{block}.layer.1.DenseReluDense.wi_1.weight", TEXT_FFN, TEXT_DIM)
        w.kernel(f"{block}.layer.1.DenseReluDense.wo.weight", TEXT_DIM, TEXT_FFN)
        w.random(f"{block}.layer.1.layer_norm.weight", TEXT_DIM, mean=1.0, std=0.1)
    w.random("encoder.final_layer_norm.weight", TEXT_DIM, mean=1.0, std=0.1)
    w.tensors["spiece_model"] = torch.frombuffer(bytearray(tokenizer_model()), dtype=torch.uint8)
    return w.tensors


# --- the video VAE ----------------------------------------------------------------------------------------------------

TAEHV_ENCODER = {2: 2, 7: 2, 12: 1}  # index of each temporal pooling -> stride; a strided kernel and 3 blocks follow
TAEHV_DECODER = {3: (256, 128, 1), 9: (128, 64, 2), 15: (64, 64, 2)}  # first block -> (width, next width, time growth)
TAEHV_PATCH = 2


def video_vae(seed: int) -> Tensors:
    """The tiny Wan2.2 autoencoder of the `taew2_2` files: 16x in space, 4x in time, RGB in 0..1."""
    w = Weights(seed, "taew2_2", torch.float16)
    pixels = 3 * TAEHV_PATCH**2
    w.layer("encoder.0", 64, pixels, 3, 3, gain=1.4)
    for index, stride in TAEHV_ENCODER.items():
        name = f"encoder.{index}.conv.weight"
        w.put(name, _time_mix(w, name, 64, stride) / stride)
        w.kernel(f"encoder.{index + 1}.weight", 64, 64, 3, 3, gain=1.4)
        for block in range(index + 2, index + 5):
            _taehv_block(w, f"encoder.{block}", 64)
    kernel = _balanced(w.draw("encoder.17.weight", VIDEO_CHANNELS, 64, 3, 3))
    w.put("encoder.17.weight", kernel * (1.4 / math.sqrt(kernel[0].numel())))
    w.random("encoder.17.bias", VIDEO_CHANNELS, std=0.05)
    w.layer("decoder.1", 256, VIDEO_CHANNELS, 3, 3, gain=1.4)
    for index, (width, after, growth) in TAEHV_DECODER.items():
        for block in range(index, index + 3):
            _taehv_block(w, f"decoder.{block}", width)
        name = f"decoder.{index + 4}.conv.weight"
        mix = _time_mix(w, name, width, growth).reshape(width, growth, width)
        w.put(name, mix.transpose(0, 1).reshape(growth * width, width, 1, 1))
        w.kernel(f"decoder.{index + 5}.weight", after, width, 3, 3, gain=1.4)
    colour = w.draw("decoder.22.weight", 3, 64, 3, 3).repeat_interleave(TAEHV_PATCH**2, dim=0)
    texture = w.draw("decoder.22.texture", pixels, 64, 3, 3)
    kernel = _balanced(colour + 0.2 * texture)
    w.put("decoder.22.weight", kernel * (0.2 / math.sqrt(kernel[0].numel())))
    w.put("decoder.22.bias", torch.full((pixels,), 0.5))
    return w.tensors


def _balanced(kernel: torch.Tensor) -> torch.Tensor:
    """Each output's weights sum to 0, so that what all inputs share (they are never negative) adds no constant."""
    return kernel - kernel.mean(dim=(1, 2, 3), keepdim=True)


def _taehv_block(w: Weights, block: str, width: int) -> None:
    """A residual block that also sees the frame before; its last kernel is weak, so that depth does not add scale."""
    w.layer(f"{block}.conv.0", width, 2 * width, 3, 3, gain=1.4)
    w.layer(f"{block}.conv.2", width, width, 3, 3, gain=1.4)
    w.layer(f"{block}.conv.4", width, width, 3, 3, gain=0.3)


def _time_mix(w: Weights, name: str, width: int, frames: int) -> torch.Tensor:
    """[width, frames * width, 1, 1]: each frame passed on almost unchanged, so that neighbouring frames stay alike."""
    same = torch.eye(width).repeat(1, frames)
    noise = w.draw(name, width, frames * width) * (0.5 / math.sqrt(width))
    return (same + noise).reshape(width, -1, 1, 1)


# --- the audio VAE and its vocoder ------------------------------------------------------------------------------------

MEL_BANDS, AUDIO_VAE_WIDTH = 80, 64
VOCODER_WIDTH, VOCODER_KERNELS, VOCODER_RES_KERNELS = 256, (8, 8, 4, 4, 4, 4), (3, 7, 11)


def audio_vae(seed: int) -> Tensors:
    """The MMAudio 16 kHz VAE as published: kernels not yet normalised, constants of the mel scale included."""
    w = Weights(seed, "mmaudio_vae", torch.float32)
    widths = [AUDIO_VAE_WIDTH * factor for factor in (1, 2, 4)]
    w.put("data_mean", mel_mean().reshape(1, -1, 1))
    w.put("data_std", torch.ones(1, MEL_BANDS, 1))
    for part in ("encoder", "decoder"):
        w.put(f"{part}.learnable_gain", torch.tensor(0.0))
        _audio_vae_block(w, f"{part}.mid.block_1", widths[2], widths[2])
        w.kernel(f"{part}.mid.attn_1.qkv.weight", 3 * widths[2], widths[2], 1)
        w.kernel(f"{part}.mid.attn_1.proj_out.weight", widths[2], widths[2], 1)
        _audio_vae_block(w, f"{part}.mid.block_2", widths[2], widths[2])
    w.kernel("encoder.conv_in.weight", widths[0], MEL_BANDS, 3)
    w.kernel("encoder.conv_out.weight", 2 * AUDIO_CHANNELS, widths[2], 3)
    w.kernel("decoder.conv_in.weight", widths[2], AUDIO_CHANNELS, 3)
    w.kernel("decoder.conv_out.weight", MEL_BANDS, widths[0], 3)
    for level, width in enumerate(widths):
        for block in range(2):
            before = widths[max(level - 1, 0)] if block == 0 else width
            _audio_vae_block(w, f"encoder.down.{level}.block.{block}", before, width)
        for block in range(3):
            before = widths[min(level + 1, 2)] if block == 0 else width
            _audio_vae_block(w, f"decoder.up.{level}.block.{block}", before, width)
    for conv in ("conv1", "conv2"):
        w.kernel(f"encoder.down.0.downsample.{conv}.weight", widths[0], widths[0], 1)
    w.kernel("decoder.up.1.upsample.conv.weight", widths[1], widths[1], 3)
    return w.tensors


def mel_mean() -> torch.Tensor:
    """[bands] typical log magnitude, falling with frequency as in speech and music."""
    return torch.linspace(-1.2, -3.0, MEL_BANDS)


def _audio_vae_block(w: Weights, block: str, before: int, width: int) -> None:
    w.kernel(f"{block}.conv1.weight", width, before, 3)
    w.kernel(f"{block}.conv2.weight", width, width, 3)
    if before != width:
        w.kernel(f"{block}.nin_shortcut.weight", width, before, 1)


def vocoder(seed: int) -> Tensors:
    """The BigVGAN generator as published: weight norm not folded, snake parameters on a logarithmic scale."""
    w = Weights(seed, "mmaudio_vocoder", torch.float32)
    low_pass = anti_alias_filter()
    _normed(w, "conv_pre", VOCODER_WIDTH, MEL_BANDS, 7, gain=1.0)
    g, v = w.tensors["conv_pre.weight_g"], w.tensors["conv_pre.weight_v"]
    kernel = v * (g / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))
    w.put("conv_pre.bias", -(kernel.sum(2) * mel_mean()).sum(1))  # only what differs from the mean is heard
    width = VOCODER_WIDTH
    for stage, kernel in enumerate(VOCODER_KERNELS):
        _normed(w, f"ups.{stage}.0", width, width // 2, kernel, gain=1.0, transposed=True)
        width //= 2
        for index, res_kernel in enumerate(VOCODER_RES_KERNELS, start=3 * stage):
            for conv in range(3):
                _normed(w, f"resblocks.{index}.convs1.{conv}", width, width, res_kernel, gain=0.5)
                _normed(w, f"resblocks.{index}.convs2.{conv}", width, width, res_kernel, gain=0.5)
            for activation in range(6):
                _snake(w, f"resblocks.{index}.activations.{activation}", width, low_pass)
    _snake(w, "activation_post", width, low_pass)
    _normed(w, "conv_post", 1, width, 7, gain=0.1)
    v = w.tensors["conv_post.weight_v"]
    w.put("conv_post.weight_v", v - v.mean(dim=2, keepdim=True))  # no constant offset in the sound
    w.put("conv_post.bias", torch.zeros(1))
    return w.tensors


def _normed(w: Weights, name: str, first: int, second: int, kernel: int, gain: float, transposed: bool = False) -> None:
    """A weight-normed kernel [first, second, kernel]: `weight_g` holds the length of each row of `weight_v`."""
    w.random(f"{name}.weight_g", first, 1, 1, mean=gain, std=0.1 * gain)
    w.random(f"{name}.weight_v", first, second, kernel, std=1.0)
    w.random(f"{name}.bias", second if transposed else first, std=0.05)


def _snake(w: Weights, name: str, width: int, low_pass: torch.Tensor) -> None:
    w.random(f"{name}.act.alpha", width, std=0.3)
    w.random(f"{name}.act.beta", width, std=0.3)
    w.put(f"{name}.upsample.filter", low_pass)
    w.put(f"{name}.downsample.lowpass.filter", low_pass)


def anti_alias_filter(taps: int = 12, ratio: int = 2) -> torch.Tensor:
    """[1, 1, taps] windowed sinc of BigVGAN's activations (Lee et al. 2023; the window of StyleGAN3)."""
    cutoff, half_width = 0.5 / ratio, 0.6 / ratio
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's rule above 50 dB; here 51 dB
    time = torch.arange(-(taps // 2), taps // 2, dtype=torch.float64) + 0.5
    window = torch.kaiser_window(taps, beta=beta, periodic=False, dtype=torch.float64)
    kernel = window * torch.sinc(2 * cutoff * time)
    return (kernel / kernel.sum()).float().reshape(1, 1, taps)


# --- files ------------------------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[int], Tensors]] = {
    "diffusion_models/ovi_tiny_random.safetensors": ovi_checkpoint,
    "text_encoders/ovi_tiny_random_umt5.safetensors": text_encoder,
    "vae/ovi_tiny_random_taew2_2.safetensors": video_vae,
    "vae/ovi_tiny_random_mmaudio_vae.safetensors": audio_vae,
    "vae/ovi_tiny_random_mmaudio_vocoder.safetensors": vocoder,
}

def make_bundle(models_dir: Path, seed: int = 0, force: bool = False) -> list[Path]:
    """Writes what is missing (everything with `force`) below `models_dir` and returns the paths written.

    A file of the same name with another seed or from another version of this tool is replaced.
    """
    metadata = {"format": "pt", "ovi_tiny_random": "true", "ovi_tiny_version": VERSION, "seed": str(seed)}
    missing = [name for name in FILES if force or read_metadata(models_dir / name) != metadata]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small draws: on a busy machine threads only wait for each other
    try:
        for name in missing:
            write_atomically(models_dir / name, safetensors_chunks(FILES[name](seed), metadata))
    finally:
        torch.set_num_threads(threads)
    return [models_dir / name for name in missing]


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the tiny random-weight model bundle (its output is noise).")
    parser.add_argument("models_dir", type=Path, help="ComfyUI's models folder")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other noise (default 0)")
    parser.add_argument("--force", action="store_true", help="write the files even when they are there")
    options = parser.parse_args(arguments)
    try:
        written = make_bundle(options.models_dir, options.seed, options.force)
    except OSError as error:
        print(f"Cannot write the tiny models to {options.models_dir}: {error.strerror or error}. "
              "Free some space or pass a folder you may write to.", file=sys.stderr)
        return 1
    for name in FILES:
        path = options.models_dir / name
        state = "written" if path in written else "present"
        print(f"{state}  {path.stat().st_size / 1e6:6.1f} MB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
