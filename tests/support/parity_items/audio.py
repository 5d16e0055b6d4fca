"""The sound codec: raw MMAudio weights rebuilt by the recipe, written to files and loaded as a user's would be."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from golden import rebuild_weights, relative_l2
from ovi_native.ovi_model.media import audio_vae
from safetensors.torch import load_file

from . import EXACT, FP32, Item

INPUTS = ("latent", "waveform_in")
HEAD_SUFFIX = "_after_load_head"  # the corner of a kernel, to check the folding
UPSTREAM_PREFIXES = {"tod.vae.": "vae.", "tod.vocoder.vocoder.": "vocoder."}


def items(golden: Path) -> Iterator[Item]:
    folder = golden / "mmaudio"
    files = sorted(folder.glob("golden_*.safetensors"))
    if not files:
        yield Item("mmaudio", float("inf"), FP32, f"no golden_*.safetensors in {folder}")
    listed = folder / "after_load_keys.json"
    unlisted = listed.exists()
    for file in files:
        tag = file.stem.removeprefix("golden_")
        truth = load_file(file)
        vae = load_golden_vae(folder, tag, truth)
        if unlisted:
            wrong = differing_keys(vae.first_stage_model, json.loads(listed.read_text()))
            unlisted = len(wrong) > 0
            if not unlisted:
                yield Item(f"mmaudio {tag} names and shapes after loading", 0.0, EXACT)
        yield from tensor_items(f"mmaudio {tag}", vae, truth)
        del vae
    if unlisted:
        yield Item("mmaudio names and shapes after loading", float(len(wrong)), EXACT, f"no model fits: {wrong[:3]}")


def load_golden_vae(folder: Path, tag: str, truth: dict):
    """Rebuild both files of a golden model (a flat and a nested pickle) and load them through the pack."""
    parts = {}
    for part in ("vae", "vocoder"):
        manifest = folder / f"{part}_{tag}_manifest.json"
        parts[part] = {name: value.to(torch.bfloat16) for name, value in rebuild_weights(manifest).items()}
        for name, entry in json.loads(manifest.read_text())["tensors"].items():
            if entry.get("constant"):
                parts[part][name] = constant(f"{part}.{name}", truth)
    with tempfile.TemporaryDirectory() as scratch:
        vae_path, vocoder_path = str(Path(scratch, "vae.pth")), str(Path(scratch, "vocoder.pt"))
        torch.save(parts["vae"], vae_path)
        torch.save({"generator": parts["vocoder"]}, vocoder_path)
        del parts
        return audio_vae.load_audio_vae(vae_path, vocoder_path)


def constant(name: str, truth: dict) -> torch.Tensor:
    """A constant buffer; of the anti-aliasing filters the golden stores one of each kind."""
    if name in truth:
        return truth[name]
    kind = "upsample.filter" if name.endswith("upsample.filter") else "downsample.lowpass.filter"
    return truth[f"vocoder.activation_post.{kind}"]


def differing_keys(model: torch.nn.Module, listed: dict) -> list[str]:
    """Names whose shapes differ between the loaded model and upstream's list of the whole module."""
    expected = {}
    for name, shape in listed.items():
        for upstream, ours in UPSTREAM_PREFIXES.items():
            name = ours + name.removeprefix(upstream) if name.startswith(upstream) else name
        expected[name] = tuple(shape)
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


@torch.no_grad()
def tensor_items(label: str, vae, truth: dict) -> Iterator[Item]:
    """One item per tensor of the golden file that is not an input."""
    model = vae.first_stage_model
    sound = truth["waveform_in"]  # [1, N]
    moments = model.vae.encode(truth["mel_in"])
    found = {
        "decoded_mel": model.vae.decode(truth["latent"]),
        "decoded_waveform": audio_vae.decode_waveform(vae, truth["latent"]),
        "mel_in": model.mel_converter(sound),
        "encoded_mean": audio_vae.encode_mean(vae, sound[:, None]),
        "encoded_logvar": moments.logvar,
        "mel_filterbank": audio_vae.mel_filterbank(),
        "hann_window": model.mel_converter.hann_window,
    }
    state = model.state_dict()
    for name in sorted(set(truth) - set(INPUTS)):
        value = found.get(name, state.get(name))
        if name.endswith(HEAD_SUFFIX) and name.removesuffix(HEAD_SUFFIX) in state:
            corner = tuple(slice(size) for size in truth[name].shape)
            value = state[name.removesuffix(HEAD_SUFFIX)][corner]
        if value is None:
            yield Item(f"{label} {name}", float("inf"), FP32, "this parity check does not know the tensor")
        else:
            yield Item(f"{label} {name}", relative_l2(value, truth[name]), FP32)
    yield Item(f"{label} samples a latent", float(found["decoded_waveform"].shape[-1]
               != audio_vae.CODEC.samples_per_latent * truth["latent"].shape[-1]), EXACT)
