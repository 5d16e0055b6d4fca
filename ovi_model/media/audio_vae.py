"""Ovi's sound codec: the MMAudio 16 kHz VAE and its BigVGAN vocoder, as one ComfyUI VAE.

    waveform [B, 1, N] 16 kHz -> mel [B, 80, N/256] -> latents [B, 20, N/512]     encode_mean
    latents [B, 20, L] -> mel [B, 80, 2L] -> waveform [B, 1, 512 L] 16 kHz         decode_waveform

MMAudio publishes two files: the VAE, whose kernels upstream normalises once after loading (`MPConv1D` of
`edm2_utils.py`), and the vocoder with weight norm still in it. ComfyUI's own MMAudio classes want both merged, with the
normalisation done, and with the mel filterbank among the weights; `merge` does that. Sizes come from the files.

The VAE returned works in core's Encode/Decode Audio nodes, which resample to and from 44.1 kHz and limit the loudness.
The two functions above stay at 16 kHz and change nothing.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.mmaudio.vae.autoencoder import AudioAutoencoder, MelConverter
from comfy.ldm.mmaudio.vae.bigvgan import BigVGANVocoder
from comfy.ldm.mmaudio.vae.vae import VAE as MMAudioVAE

from ..files.identify import describe_weights
from ..files.loading import require_all
from ..files.names import printable
from ..files.reader import StateDict, load_weights
from ..geometry import MMAUDIO_16K as CODEC

FFT_SIZE = 1024
NORM_EPSILON = 1e-4  # of upstream's kernel normalisation

VOCODER_CONFIG = {
    "resblock": "1",
    "upsample_rates": [4, 4, 2, 2, 2, 2],
    "upsample_kernel_sizes": [8, 8, 4, 4, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "activation": "snakebeta",
    "snake_logscale": True,
}

MERGED_KEY = "vae.decoder.conv_in.weight"  # in files that hold both parts in ComfyUI's layout
WANTED = ("Choose the VAE 'v1-16.pth' (or mmaudio_vae_16k_*.safetensors) and the vocoder 'best_netG.pt' (or "
          "mmaudio_vocoder_bigvgan_best_netG_*.safetensors); both belong in models/vae.")


class SizedAudioAutoencoder(AudioAutoencoder):
    """Core's MMAudio autoencoder at the sizes of a state dict; core's own constructor knows the published size only."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.mel_converter = MelConverter(
            sampling_rate=CODEC.sample_rate, n_fft=FFT_SIZE, num_mels=CODEC.mel_bands, hop_size=CODEC.mel_hop,
            win_size=FFT_SIZE, fmin=0, fmax=CODEC.sample_rate // 2, norm_fn=torch.log10)
        hidden, bands, _ = state_dict["vae.encoder.conv_in.weight"].shape
        channels = state_dict["vae.decoder.conv_in.weight"].shape[1]
        self.vae = MMAudioVAE(data_dim=bands, embed_dim=channels, hidden_dim=hidden)
        width, bands, _ = state_dict["vocoder.conv_pre.weight"].shape
        self.vocoder = BigVGANVocoder({**VOCODER_CONFIG, "num_mels": bands, "upsample_initial_channel": width})


class AudioVAE(comfy.sd.VAE):
    """A `comfy.sd.VAE` around `SizedAudioAutoencoder`, with the settings core gives its own MMAudio VAE.

    Core builds the module inside its constructor. The constructor runs here on core's one-parameter "pixel space" VAE,
    which sets every default a later ComfyUI may add; then the module and the settings of this codec take its place.
    """

    def __init__(self, state_dict: StateDict, disable_dynamic: bool = False) -> None:
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        self.working_dtypes = [torch.float32]
        self.vae_dtype = torch.float32
        asked = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        if asked != self.vae_dtype:  # from --bf16-vae or --fp16-vae; there is no 16-bit FFT for the mel step
            logging.warning("The audio VAE computes in float32, not in %s as ComfyUI was started with: its "
                            "spectrogram needs that.", str(asked).removeprefix("torch."))
        self.first_stage_model = SizedAudioAutoencoder(state_dict).eval().to(self.vae_dtype)
        comfy.model_management.archive_model_dtypes(self.first_stage_model)

        seconds_ratio = 44_100 / CODEC.sample_rate  # core resamples to its usual rate on both sides
        self.upscale_ratio = self.downscale_ratio = CODEC.samples_per_latent * seconds_ratio
        self.memory_used_encode = lambda shape, dtype: 30 * shape[2] * comfy.model_management.dtype_size(dtype)
        self.memory_used_decode = lambda shape, dtype: (
            90 * shape[2] * self.upscale_ratio * comfy.model_management.dtype_size(dtype))
        self.latent_channels = state_dict["vae.decoder.conv_in.weight"].shape[1]
        self.latent_dim = 1
        self.output_channels = 2
        self.process_input = self.process_output = _unchanged
        self.crop_input = False
        self.disable_offload = False

        patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        self.patcher = patcher(self.first_stage_model, load_device=self.device,
                               offload_device=comfy.model_management.vae_offload_device())
        self.first_stage_model.load_state_dict(state_dict, strict=False, assign=self.patcher.is_dynamic())
        self.size = None
        self.model_size()


def _unchanged(audio: torch.Tensor) -> torch.Tensor:
    return audio


def load_audio_vae(vae_path: str, vocoder_path: str | None = None) -> comfy.sd.VAE:
    """Load MMAudio's VAE and vocoder, each `.pth`, `.pt` or `.safetensors`, as one ComfyUI VAE.

    vocoder_path may be None when vae_path is a merged file in ComfyUI's layout. Raises RuntimeError with a sentence for
    the user if a file is wrong, swapped with the other, or incomplete.
    """
    return _load(vae_path, vocoder_path, disable_dynamic=False)


def reload_patcher(vae_path: str, vocoder_path: str | None, disable_dynamic: bool = False):
    """Load the same files again, for core's multi-GPU clones and its non-dynamic delegates."""
    return _load(vae_path, vocoder_path, disable_dynamic).patcher


def _load(vae_path: str, vocoder_path: str | None, disable_dynamic: bool) -> AudioVAE:
    vae_name = printable(Path(vae_path).name)
    vae_weights, _ = load_weights(vae_path, nested="generator")
    merged = MERGED_KEY in vae_weights
    check_weight_norm(vae_weights, vae_name)
    if merged and vocoder_path not in (None, vae_path):
        raise RuntimeError(f"{vae_name} has its vocoder merged in, and {printable(Path(vocoder_path).name)} was given "
                           "as well; choose no separate vocoder.")
    if merged:
        name = vae_name
        state_dict = _prefixed(fold_weight_norm(_part(vae_weights, "vocoder.")), "vocoder.")
        state_dict |= _prefixed(_part(vae_weights, "vae."), "vae.") | mel_buffers()
    else:
        vocoder_name = None if vocoder_path is None else printable(Path(vocoder_path).name)
        vocoder_weights = {} if vocoder_path is None else load_weights(vocoder_path, nested="generator")[0]
        _check_pair(vae_weights, vae_name, vocoder_weights, vocoder_name)
        check_weight_norm(vocoder_weights, str(vocoder_name))
        name = f"{vae_name} with {vocoder_name}"
        state_dict = merge(vae_weights, vocoder_weights)
    _check_complete(state_dict, name)
    vae = AudioVAE(state_dict, disable_dynamic)
    vae.patcher.cached_patcher_init = (reload_patcher, (vae_path, vocoder_path))
    return vae


def _check_pair(vae: StateDict, vae_name: str, vocoder: StateDict, vocoder_name: str | None) -> None:
    """Raise RuntimeError unless the two state dicts are the two halves that belong together."""
    if _is_vocoder(vae) and _is_vae(vocoder):
        raise RuntimeError(f"The two files are swapped: {vae_name} is the vocoder and {vocoder_name} is the VAE. "
                           "Exchange them.")
    if not _is_vae(vae):
        raise RuntimeError(f"{vae_name} is {describe_weights(vae)}, not the MMAudio 16 kHz VAE. {WANTED}")
    if vocoder_name is None:
        raise RuntimeError(f"{vae_name} is the MMAudio VAE without its vocoder, which is a second file. {WANTED}")
    if not _is_vocoder(vocoder):
        raise RuntimeError(f"{vocoder_name} is {describe_weights(vocoder)}, not the BigVGAN vocoder. {WANTED}")


def _is_vae(weights: StateDict) -> bool:
    return all(name in weights and weights[name].ndim == 3
               for name in ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"))


def _is_vocoder(weights: StateDict) -> bool:
    return any(name.startswith("conv_pre.") for name in weights)


def _check_complete(state_dict: StateDict, name: str) -> None:
    """Raise RuntimeError unless the merged state dict is the 16 kHz model and fills every tensor of it."""
    for key in ("vae.encoder.conv_in.weight", "vae.decoder.conv_in.weight", "vocoder.conv_pre.weight"):
        if key not in state_dict or state_dict[key].ndim != 3 or 0 in state_dict[key].shape:
            raise RuntimeError(f"{name}: the tensor '{key}' is missing or no kernel; download the file again.")
    bands = state_dict["vae.encoder.conv_in.weight"].shape[1]
    channels = state_dict["vae.decoder.conv_in.weight"].shape[1]
    vocoder_bands = state_dict["vocoder.conv_pre.weight"].shape[1]
    if (bands, channels) != (CODEC.mel_bands, CODEC.channels):
        kind = "MMAudio's 44 kHz VAE" if (bands, channels) == (128, 40) else "an unknown MMAudio VAE"
        raise RuntimeError(f"{name}: this is {kind} ({bands} mel bands, {channels} latent channels); Ovi needs the "
                           f"16 kHz one ({CODEC.mel_bands} and {CODEC.channels}). {WANTED}")
    if vocoder_bands != CODEC.mel_bands:
        raise RuntimeError(f"{name}: the vocoder takes {vocoder_bands} mel bands; Ovi needs the 16 kHz one, which "
                           f"takes {CODEC.mel_bands}. {WANTED}")
    with torch.device("meta"):
        model = SizedAudioAutoencoder(state_dict)
    require_all(state_dict, model, name, optional=".filter")


def merge(vae: StateDict, vocoder: StateDict) -> StateDict:
    """Build core's state dict (`vae.*`, `vocoder.*`, `mel_converter.*`, fp32) from upstream's two."""
    return (_prefixed(normalise_kernels(vae), "vae.") | _prefixed(fold_weight_norm(vocoder), "vocoder.")
            | mel_buffers())


def normalise_kernels(vae: StateDict) -> StateDict:
    """Scale each output channel of each kernel to unit length, once and in fp32 (upstream: `remove_weight_norm`)."""
    out = {name: value.float() for name, value in vae.items()}
    for name, kernel in out.items():
        if name.endswith(".weight"):
            dims = tuple(range(1, kernel.ndim))
            size = math.prod(kernel.shape[1:])
            length = torch.linalg.vector_norm(kernel, dim=dims, keepdim=True)
            out[name] = kernel / (length + NORM_EPSILON * math.sqrt(size))
    return out


def fold_weight_norm(vocoder: StateDict) -> StateDict:
    """Replace each length and direction pair by its kernel, in fp32; accepts both of PyTorch's namings.

    The length is taken over all axes but the first, for transposed convolutions too. A row without a direction is 0.
    """
    names = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
    out = {}
    for name, value in vocoder.items():
        for long, short in names.items():
            name = name.replace(long, short)
        out[name] = value.float()
    for layer in [name.removesuffix(".weight_v") for name in out if name.endswith(".weight_v")]:
        if f"{layer}.weight_g" in out:
            length, rows = out.pop(f"{layer}.weight_g"), out.pop(f"{layer}.weight_v")
            norm = torch.linalg.vector_norm(rows, dim=(1, 2), keepdim=True)
            out[f"{layer}.weight"] = rows * (length / norm.where(norm > 0, 1.0))
    return out


def check_weight_norm(weights: StateDict, name: str) -> None:
    """Raise RuntimeError unless each length and direction pair in a file fits together."""
    names = {".weight_v": ".weight_g", ".weight.original1": ".weight.original0"}
    for key, rows in weights.items():
        for direction, length in names.items():
            lengths = weights.get(key.removesuffix(direction) + length) if key.endswith(direction) else None
            if lengths is not None and (rows.ndim != 3 or tuple(lengths.shape) != (rows.shape[0], 1, 1)):
                raise RuntimeError(f"{name}: the shapes {list(rows.shape)} of {key} and {list(lengths.shape)} of its "
                                   "lengths do not fit. The file is damaged; download it again.")


def mel_buffers() -> StateDict:
    """The constants of the mel step, which upstream computes and core expects among the weights."""
    return {"mel_converter.mel_basis": mel_filterbank(),
            "mel_converter.hann_window": torch.hann_window(FFT_SIZE)}


def mel_filterbank() -> torch.Tensor:
    """[80, 513] triangles from 0 to 8000 Hz on Slaney's mel scale, each of unit area (Auditory Toolbox, 1998).

    Slaney's scale is linear below 1000 Hz (15 steps) and logarithmic above (27 steps per factor of 6.4).
    """
    top_mel = 15 + 27 * math.log(CODEC.sample_rate / 2 / 1000) / math.log(6.4)
    mels = torch.linspace(0, top_mel, CODEC.mel_bands + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))  # Hz
    bins = torch.linspace(0, CODEC.sample_rate / 2, FFT_SIZE // 2 + 1, dtype=torch.float64)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = (edges[2:] - edges[:-2])[:, None] / 2
    return (torch.minimum(rising, falling).clamp(min=0) / area).float()


def _prefixed(weights: StateDict, prefix: str) -> StateDict:
    return {prefix + name: value for name, value in weights.items()}


def _part(weights: StateDict, prefix: str) -> StateDict:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def decode_waveform(vae: comfy.sd.VAE, audio_latents: torch.Tensor) -> torch.Tensor:
    """Decode at the model's own 16 kHz, with neither resampling nor loudness changes.

    audio_latents: [B, 20, L]. Returns fp32 [B, 1, 512 L] in -1..1 on ComfyUI's intermediate device. Raises ValueError
    if the latents have another shape or the VAE is not an MMAudio VAE.
    """
    model = _autoencoder(vae)
    if audio_latents.ndim != 3 or audio_latents.shape[1] != model.vae.embed_dim or audio_latents.shape[2] == 0:
        raise ValueError(f"Audio latents of shape {list(audio_latents.shape)} were given; the audio VAE decodes "
                         f"[batch, {model.vae.embed_dim}, length]. Pass the audio half of an Ovi latent.")
    return _run(vae, audio_latents, vae.memory_used_decode, lambda z: model.vocoder(model.vae.decode(z)))


def encode_mean(vae: comfy.sd.VAE, waveform: torch.Tensor) -> torch.Tensor:
    """Encode sound that is at 16 kHz already to the mean of its latent distribution.

    waveform: [B, channels, N]; channels are averaged, samples beyond -1..1 clipped, an incomplete last latent dropped.
    Returns fp32 [B, 20, N // 512]. Raises ValueError if N is under one latent or the VAE is not an MMAudio VAE.
    """
    model = _autoencoder(vae)
    if waveform.ndim != 3 or waveform.shape[2] < CODEC.samples_per_latent:
        raise ValueError(f"A waveform of shape {list(waveform.shape)} was given; the audio VAE encodes "
                         f"[batch, channels, samples] with at least {CODEC.samples_per_latent} samples at 16 kHz.")
    mono = waveform.mean(dim=1, keepdim=True)  # [B, 1, N]
    return _run(vae, mono, vae.memory_used_encode,
                lambda sound: model.vae.encode(model.mel_converter(sound.squeeze(1))).mean)


def check_audio_vae(vae: comfy.sd.VAE) -> None:
    """Raise ValueError unless this is an MMAudio VAE."""
    _autoencoder(vae)


def _autoencoder(vae: comfy.sd.VAE) -> AudioAutoencoder:
    model = getattr(vae, "first_stage_model", None)
    if not isinstance(model, AudioAutoencoder):
        raise ValueError(f"This VAE ({type(model).__name__}) is no MMAudio VAE; connect the output of "
                         "'Load Ovi Audio VAE'.")
    return model


@torch.no_grad()
def _run(vae: comfy.sd.VAE, batch: torch.Tensor, memory_used, function) -> torch.Tensor:
    """Run function on each item of the batch on the VAE's device, loaded there by ComfyUI's memory management."""
    with comfy.model_management.cuda_device_context(vae.device):
        comfy.model_management.load_models_gpu(
            [vae.patcher], memory_required=memory_used(batch.shape, vae.vae_dtype), force_full_load=vae.disable_offload)
        out = [function(item[None].to(device=vae.device, dtype=vae.vae_dtype)).float() for item in batch]
    return torch.cat(out).to(comfy.model_management.intermediate_device())
