"""From Ovi checkpoints on disk to ComfyUI's MODEL.

One joint file or the two halves of a split model, in any layout `layouts` reads. What the shapes cannot tell, which of
the three released variants a file is, comes from its metadata or its name, and travels with the MODEL.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_detection
import comfy.sd
import torch

from ..files.disk import human
from ..files.identify import describe_weights
from ..files.loading import ALWAYS_ALLOCATED, require_all
from ..files.names import printable
from ..files.quant_records import QUANT_SUFFIXES, read_record
from ..files.quantise import quantise_tensors
from ..files.reader import StateDict, load_weights
from ..sampling.stream_guidance import attach
from .catalogue import variant_of
from .layouts import WANTED, read_towers
from .model import OviModel
from .model_base import OviBaseModel
from .quant_recipe import FORMATS
from .supported_models import read_sizes
from .variants import GEOMETRY, VARIANT_KEY

BLOCK = re.compile(r"(audio_model\.)?blocks\.[^.]*\.")
TENSORS_A_BLOCK = 30  # of the 34 in each tower, so that a few missing ones are named


@dataclass(frozen=True)
class CheckpointReport:
    """What was found on disk, for the node's display."""

    name: str
    layout: str
    precision: str
    parameters: int
    bytes: int
    blocks: int
    width: int
    variant: str | None

    def __str__(self) -> str:
        variant = self.variant or "variant unknown: choose it in the node"
        names = {"upstream": "as Ovi's makers published it", "core": "as ComfyUI names its parts"}
        layout = names.get(self.layout, self.layout)
        return (f"{self.name}: Ovi {variant}, {layout}, {self.precision}, {self.parameters / 1e9:.2f} B parameters in "
                f"{human(self.bytes)}, 2 x {self.blocks} blocks, width {self.width}")


def load_model(path: str, weight_dtype: torch.dtype | str | None = None, second_path: str | None = None,
               variant: str | None = None):
    """Load an Ovi model.

    path: `.safetensors`, `.pt` or `.pth` (weights only), joint or one half. second_path: the other half; None looks for
    it beside the first. weight_dtype: None keeps core's choice for the device, a name from `quant_recipe.FORMATS`
    quantises while loading. variant: None asks the files. Returns (ModelPatcher, CheckpointReport). Raises RuntimeError
    with a sentence for the user if the files are no complete Ovi model, ValueError if the format does not run here.
    """
    patcher, report = _load(path, second_path, weight_dtype, variant, disable_dynamic=False)
    return patcher, report


def reload_patcher(path, second_path, weight_dtype, variant, disable_dynamic: bool = False):
    """Load the same files again, for core's multi-GPU clones and its non-dynamic delegates."""
    return _load(path, second_path, weight_dtype, variant, disable_dynamic)[0]


def _load(path, second_path, weight_dtype, variant, disable_dynamic: bool):
    tensors, report = read_checkpoint(path, second_path, variant)
    if isinstance(weight_dtype, str):
        tensors = quantise_tensors(tensors, FORMATS[weight_dtype])
        precision = f"{report.precision}, quantised to {weight_dtype} while loading"
        report = replace(report, precision=precision, bytes=sum(t.nbytes for t in tensors.values()))
    options = {"dtype": weight_dtype} if isinstance(weight_dtype, torch.dtype) else {}
    patcher = comfy.sd.load_diffusion_model_state_dict(
        tensors, model_options=options, metadata={}, disable_dynamic=disable_dynamic)
    if patcher is None or not isinstance(patcher.model, OviBaseModel):
        raise RuntimeError(f"{report.name} was not recognised as an Ovi model by ComfyUI: another pack may have "
                           "replaced its list of models. Restart ComfyUI without that pack.")
    patcher.set_attachments(VARIANT_KEY, report.variant)
    attach(patcher)
    patcher.cached_patcher_init = (reload_patcher, (path, second_path, weight_dtype, variant))
    return patcher, report


def read_checkpoint(path: str, second_path: str | None = None, variant: str | None = None, read=None):
    """Read one or two files into (complete core-layout tensors, CheckpointReport); see `load_model`.

    read: what to read a path with, `read_part` by default; it returns a Part.
    """
    read = read or read_part
    parts = [read(path)]
    if not parts[0].joint:
        second_path = second_path or find_partner(path)
        if second_path is None:
            raise RuntimeError(f"{parts[0].name} holds {parts[0].describe()}. Choose the file with the other tower as "
                               "second file, or give both files the same name but for 'video' and 'audio'.")
        parts.append(read(second_path))
    elif second_path is not None:
        raise RuntimeError(f"{parts[0].name} holds both towers already; set the second file to none.")
    tensors = join(parts)
    name = " + ".join(part.name for part in parts)
    tensors = check_complete(tensors, name)
    if variant is None:
        variant = next(filter(None, (part.variant for part in parts)), None)
    layout = parts[0].layout if len(parts) == 1 else "split"
    return tensors, describe(tensors, name, layout, variant)


@dataclass(frozen=True)
class Part:
    """One file, in core's names."""

    name: str
    tensors: StateDict
    layout: str
    variant: str | None

    @property
    def joint(self) -> bool:
        return self.layout in ("upstream", "core")

    def describe(self) -> str:
        return f"only Ovi's {self.layout}"


def read_part(path: str) -> Part:
    """Read one file; RuntimeError with a sentence if it holds no Ovi tower, or a Wan model that never was Ovi's."""
    return make_part(Path(path).name, *load_weights(path))


def make_part(name: str, tensors: StateDict, metadata: dict[str, str]) -> Part:
    """What `read_part` makes of a file's contents; tensors may lie on the meta device."""
    variant, name = variant_of(name, metadata), printable(name)
    towers, layout = read_towers(tensors, metadata, name)
    if layout == "video tower" and not any("k_fusion" in key for key in towers):
        raise RuntimeError(f"{name} is {describe_weights(towers)} that was never joined with Ovi's audio tower. "
                           f"{WANTED}")
    return Part(name, towers, layout, variant)


def join(parts: list[Part]) -> StateDict:
    """Merge a video and an audio tower; RuntimeError if the two files are not one of each."""
    if len(parts) == 2 and sorted(part.layout for part in parts) != ["audio tower", "video tower"]:
        raise RuntimeError(f"{parts[0].name} holds {parts[0].describe()} and {parts[1].name} holds "
                           f"{'both towers' if parts[1].joint else parts[1].describe()}: choose one file with each "
                           "tower, or one joint file alone.")
    return {key: tensor for part in parts for key, tensor in part.tensors.items()}


def find_partner(path: str) -> str | None:
    """The other half of a split model beside a file: the same name with 'video' and 'audio' exchanged."""
    name = Path(path).name
    swap = {"video": "audio", "audio": "video", "Video": "Audio", "Audio": "Video", "VIDEO": "AUDIO", "AUDIO": "VIDEO"}
    other = re.sub("video|audio", lambda word: swap.get(word[0], word[0]), name, flags=re.IGNORECASE)
    partner = Path(path).with_name(other)
    return str(partner) if other != name and partner.is_file() else None


def check_complete(state_dict: StateDict, name: str) -> StateDict:
    """Return the tensors of the model that a core-layout state dict describes, without strangers.

    Raises RuntimeError unless it fills every parameter.
    """
    config = read_config(state_dict, name)
    model = OviModel(**config, device="meta", dtype=torch.bfloat16, operations=ALWAYS_ALLOCATED)
    expected = require_all(state_dict, model, name)
    layers = {key.rpartition(".")[0] for key in expected if key.endswith(".weight")}
    return {key: tensor for key, tensor in state_dict.items()
            if key in expected or (key.endswith(QUANT_SUFFIXES) and key.rpartition(".")[0] in layers)}


def read_config(state_dict: StateDict, name: str) -> dict:
    """The constructor arguments of `OviModel` that a core-layout state dict implies.

    Raises RuntimeError if it is another model, or if its two towers do not belong together.
    """
    blocks = {match[0] for match in map(BLOCK.match, state_dict) if match}
    if len(state_dict) < TENSORS_A_BLOCK * len(blocks):
        raise RuntimeError(f"{name} is incomplete: it has {len(state_dict)} tensors for {len(blocks)} blocks. Download "
                           "it again.")
    try:
        if "head.modulation" not in state_dict:  # without it core does not take the file for a Wan model at all
            raise KeyError("head.modulation")
        config = comfy.model_detection.detect_unet_config(state_dict, "")
        sizes = read_sizes(state_dict)
    except KeyError as e:
        raise RuntimeError(f"{name} is incomplete: it lacks the tensor {e}. Download it again.") from e
    except (ValueError, IndexError) as e:
        raise RuntimeError(f"{name} is damaged: a tensor that tells the model's size has the wrong number of "
                           f"dimensions ({e}). Download it again.") from e
    if config.get("model_type") != "t2v":
        raise RuntimeError(f"{name} is no Ovi model this pack knows: it has extra tensors of Wan's "
                           f"'{config.get('model_type')}' models. Choose an unmodified Ovi checkpoint.")
    video, audio = config | sizes, sizes["audio_config"]
    if video["num_layers"] != audio["num_layers"]:
        raise RuntimeError(f"{name} is incomplete: its video tower has {video['num_layers']} blocks, its audio tower "
                           f"{audio['num_layers']}. Download it again.")
    if video["dim"] != audio["dim"]:
        raise RuntimeError(f"{name} is no Ovi model: its video tower is {video['dim']} wide, its audio tower "
                           f"{audio['dim']}. Choose two halves of the same model.")
    channels = video["in_dim"], video["out_dim"], audio["in_dim"], audio["out_dim"]
    known = (*2 * [GEOMETRY.video.channels], *2 * [GEOMETRY.audio.channels])
    if channels != known or video["dim"] % 128 or not video["dim"] or not video["num_layers"]:
        raise RuntimeError(f"{name} is no Ovi model this pack knows: its towers are {video['dim']} wide and have "
                           f"{channels} channels. Choose an unmodified Ovi checkpoint.")
    return video


def describe(tensors: StateDict, name: str, layout: str, variant: str | None) -> CheckpointReport:
    """Summarise core-layout tensors."""
    weights = {key: tensor for key, tensor in tensors.items() if not key.endswith(QUANT_SUFFIXES)}
    elements: Counter[str] = Counter()
    for tensor in weights.values():
        elements[str(tensor.dtype).removeprefix("torch.")] += tensor.nelement()
    formats = sorted({read_record(tensor)["format"] for key, tensor in tensors.items() if key.endswith(".comfy_quant")})
    precision = " + ".join(formats) + " (quantised)" if formats else elements.most_common(1)[0][0]
    audio = read_sizes(tensors)["audio_config"]
    return CheckpointReport(name, layout, precision, sum(elements.values()), sum(t.nbytes for t in tensors.values()),
                            audio["num_layers"], audio["dim"], variant)
