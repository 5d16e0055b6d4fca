"""LoRA files for Ovi, from every naming in circulation to core's patches, sorted by what they act on.

A name in such a file is a layer and a tail (`.lora_A.weight`, `.alpha`, `.diff`, ...). Core reads all tails, but of the
layers it knows `diffusion_model.*` and `lora_unet_*` alone. Here each layer is found under any of these, and renamed:

| layer | written by |
|---|---|
| `video_model.blocks.0.self_attn.q`, `audio_model.…` | Ovi's own names |
| `blocks.0.self_attn.q` | Wan's, DiffSynth; the video tower, unless the file names layers only the audio tower has |
| `blocks.0.attn1.to_q`, `condition_embedder.…` | diffusers |
| any of them after `diffusion_model.`, `transformer.`, `base_model.model.`, `module.`, ... | PEFT and trainers |
| any of them with `_` for `.` after `lora_unet_`, `lycoris_`, `lora_transformer_` | kohya, LyCORIS, OneTrainer |

The mathematics is core's: its weight adapters, its `load_lora` and its `add_patches`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter import WeightAdapterBase

from ..files.identify import describe_weights
from ..files.reader import StateDict
from .layouts import AUDIO_PREFIX, VIDEO_PREFIX

ROOT = "diffusion_model."
TABLE = ".modulation"
GROUPS = ("video", "audio", "sound_to_picture", "picture_to_sound")
"""What a patch acts on: a tower, or the layers with which one tower reads the other."""

WRAPPERS = ("base_model.model.", "base_model.", "model.", "module.", ROOT, "transformer.", "unet.", "pipe.", "dit.")
FLAT_WRAPPERS = ("lora_unet_", "lycoris_", "lora_transformer_", "lora_dit_",
                 *(wrapper.replace(".", "_") for wrapper in WRAPPERS))

TAIL = re.compile(
    r"(?:\.lora_(?:up|down|mid)\.weight|[._]lora\.(?:up|down)\.weight|\.lora_linear_layer\.(?:up|down)\.weight"
    r"|\.lora_(?P<matrix>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?P<part>\.weight|\.bias)?"
    r"|(?P<magnitude>\.lora_magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
    r"|\.hada_(?:w[12]_[ab]|t[12])|\.lokr_(?:w[12](?:_[ab])?|t2)|\.[ab][12]\.weight|\.oft_blocks|\.rescale"
    r"|(?P<direct>\.(?:diff|diff_b|set_weight|w_norm|b_norm))|\.(?:alpha|dora_scale|reshape_weight))$")

# Core's names for parts of a Wan model, and those of diffusers (scripts/convert_wan_to_diffusers.py).
DIFFUSERS_BLOCK = {"self_attn.": "attn1.", "cross_attn.": "attn2.", "norm3": "norm2", "ffn.0": "ffn.net.0.proj",
                   "ffn.2": "ffn.net.2", "modulation": "scale_shift_table"}
DIFFUSERS_PROJECTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
DIFFUSERS_OUTER = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out", "head.modulation": "scale_shift_table",
}
WIDTHS = {1536: "Wan 1.3B", 3072: "Wan2.2 5B or Ovi", 5120: "Wan 14B"}
# Parts of names, and the models that have them; the first match counts.
STRANGERS = (
    ("double_blocks", "Flux or HunyuanVideo"), ("joint_blocks", "Stable Diffusion 3"),
    ("transformer_blocks", "a model with transformer_blocks, such as LTX-Video, Qwen-Image or Flux"),
    ("down_blocks", "Stable Diffusion"), ("input_blocks", "Stable Diffusion"), ("lora_te", "a text encoder"),
    ("text_encoder", "a text encoder"), ("text_model", "a text encoder"), ("layers_", "another model"),
)


@dataclass
class LoraPatches:
    """What a file holds for a model: core's patches by model key, and the names that came to nothing."""

    patches: dict[str, object] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    misfits: dict[str, tuple[int, ...] | None] = field(default_factory=dict)  # model key -> shape in the file

    def layers(self, group: str) -> set[str]:
        """Names of the layers of one of GROUPS that have a patch."""
        return {layer_of(key) for key in self.patches if group_of(key) == group}


def group_of(key: str) -> str:
    """Which of GROUPS a model key belongs to."""
    audio = key.startswith(ROOT + AUDIO_PREFIX)
    if "_fusion." in key:
        return "picture_to_sound" if audio else "sound_to_picture"
    return "audio" if audio else "video"


def layer_of(key: str) -> str:
    """A model key without the name of its parameter."""
    return key.removesuffix(".weight").removesuffix(".bias")


# --- names ------------------------------------------------------------------------------------------------------------


class Names:
    """Finds the layers of one model under the names that files use."""

    def __init__(self, keys: Iterable[str]) -> None:
        """keys: those of the model's state dict."""
        self.layers: dict[str, str] = {}  # a file's name for a layer, without wrappers -> model key
        for key in keys:
            if key.startswith(ROOT) and key.endswith((".weight", TABLE)):
                self._enter(key.removeprefix(ROOT), key)
        self.flat = {name.replace(".", "_"): key for name, key in self.layers.items()}
        self.audio_only = {name.removeprefix(AUDIO_PREFIX) for name in self.layers if name.startswith(AUDIO_PREFIX)
                           and name.removeprefix(AUDIO_PREFIX) not in self.layers}

    def _enter(self, core: str, key: str) -> None:
        tower = AUDIO_PREFIX if core.startswith(AUDIO_PREFIX) else ""
        name = core.removeprefix(tower).removesuffix(".weight")
        names = {name, _diffusers(name)}
        if name.endswith(TABLE):
            names.add(name + TABLE)  # upstream's tables are modules of their own
        for name in names:
            self.layers[tower + name] = key
            if not tower:
                self.layers[VIDEO_PREFIX + name] = key

    def unwrap(self, name: str) -> str:
        """A file's name for a layer without its wrappers."""
        flat = "." not in name
        known, wrappers = (self.flat, FLAT_WRAPPERS) if flat else (self.layers, WRAPPERS)
        name = name.replace("_processor_", "_") if flat else name.replace(".processor.", ".")
        while name not in known:
            wrapper = next(filter(name.startswith, wrappers), None)
            if wrapper is None:
                break
            name = name.removeprefix(wrapper).lstrip("_")  # kohya's for Wan-Fun begin with lora_unet__
        return name

    def find(self, stripped: str, root_is_audio: bool) -> str | None:
        """The model key of a layer; root_is_audio: names without a tower are the audio tower's."""
        known, audio = (self.layers, AUDIO_PREFIX) if "." in stripped else (self.flat, AUDIO_PREFIX.replace(".", "_"))
        return (known.get(audio + stripped) if root_is_audio else None) or known.get(stripped)

    def names_audio_alone(self, stripped: Iterable[str]) -> bool:
        """Whether a file's layers without a tower's name are the audio tower's: some are only there."""
        only = self.audio_only | {name.replace(".", "_") for name in self.audio_only}
        return any(name in only for name in stripped)


def _diffusers(name: str) -> str:
    block = re.match(r"blocks\.\d+\.", name)
    if block is None:
        return DIFFUSERS_OUTER.get(name, name)
    rest = name[block.end():]
    for core, theirs in DIFFUSERS_BLOCK.items():
        if rest.startswith(core):
            rest = theirs + rest[len(core):]
            break
    head, _, last = rest.rpartition(".")
    if head in ("attn1", "attn2"):
        rest = f"{head}.{DIFFUSERS_PROJECTION.get(last, last)}"
    return block[0] + rest


def _tail(match: re.Match) -> str:
    """Core's spelling of a tail: without PEFT's adapter name, and with its names for PEFT's DoRA and biases."""
    if match["magnitude"]:
        return ".dora_scale"
    if match["matrix"]:
        return ".diff_b" if match["part"] == ".bias" and match["matrix"] == "B" else f".lora_{match['matrix']}.weight"
    return match[0]


def rename(tensors: StateDict, names: Names) -> tuple[StateDict, dict[str, str], dict[str, str]]:
    """Rename what can be found: (tensors by core's names, core's layer name -> model key, core's name -> file's)."""
    split = {name: match for name, match in ((name, TAIL.search(name)) for name in tensors) if match}
    stripped = {name: names.unwrap(name[:match.start()]) for name, match in split.items()}
    root_is_audio = names.names_audio_alone(stripped.values())
    renamed: StateDict = {}
    targets: dict[str, str] = {}
    origin: dict[str, str] = {}
    for name, match in split.items():
        key = names.find(stripped[name], root_is_audio)
        if key is None:
            continue
        layer, tail, tensor = key.removesuffix(".weight"), _tail(match), tensors[name]
        scaled_bias = match["part"] == ".bias" and f"{name[:match.start()]}.alpha" in tensors  # core cannot scale it
        if scaled_bias or (tail == ".alpha" and tensor.numel() != 1) or layer + tail in renamed:
            continue
        if match["magnitude"]:
            tensor = tensor.reshape(-1, 1)  # PEFT has [rows], core [rows, 1]
        renamed[layer + tail], targets[layer], origin[layer + tail] = tensor, key, name
    return renamed, targets, origin


# --- patches ----------------------------------------------------------------------------------------------------------


def read_lora(model, tensors: StateDict, name: str) -> LoraPatches:
    """Make a file's tensors core's patches for an Ovi model (its `BaseModel`); changes neither.

    Raises RuntimeError, saying what the file looks like, if it is damaged or nothing in it fits the model.
    """
    keys = model.state_dict().keys()
    renamed, targets, origin = rename(tensors, Names(keys))
    renamed = {key: tensor.clone() for key, tensor in renamed.items()}  # the file may be replaced while they are in use
    for key, tensor in renamed.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise RuntimeError(f"{name} is damaged: {origin[key]} holds values that are not finite, which would spoil "
                               "picture and sound. Download or train it again.")
    try:
        loaded = comfy.lora.load_lora(renamed, targets, log_missing=False)
    except KeyError as error:
        lost = str(error).strip("'\"").removeprefix(ROOT)
        raise RuntimeError(
            f"{name} is damaged or incomplete: it lacks the tensor {lost}. Download it again.") from error
    taken = {key for key in renamed if TAIL.search(key)["direct"]}  # type: ignore[index]
    found = LoraPatches()
    for key, patch in loaded.items():
        if key not in keys:  # a bias where the layer has none
            taken -= {f"{layer_of(key)}.diff_b", f"{layer_of(key)}.b_norm"}
            continue
        taken |= patch.loaded_keys if isinstance(patch, WeightAdapterBase) else set()
        shape = tuple(comfy.utils.get_attr(model, key).shape)  # of the matrix, however it is stored
        change = change_shape(patch, shape)
        if change == shape:
            found.patches[key] = patch
        else:
            found.misfits[key] = change
    used = {origin[key] for key in taken}
    found.unmatched = [key for key in tensors if key not in used]
    if not found.patches:
        raise RuntimeError(f"{name} does not fit this Ovi model: {_looks_like(model, tensors, found)}")
    return found


def change_shape(patch, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of what a patch adds to a parameter of `shape`; None if it cannot be computed."""
    if not isinstance(patch, WeightAdapterBase):
        return tuple(patch[1][0].shape)  # a difference, or the parameter itself
    if patch.name == "lora":
        up, down, _, mid, _, resized = patch.weights
        if resized is not None:
            return tuple(resized)
        rows, columns = up.shape[0], down.shape[1:] if mid is None else (down.shape[1], *mid.shape[2:])
        if mid is None and prod(up.shape[1:]) != down.shape[0]:  # the two were not trained together
            return None
        return shape if rows == shape[0] and prod(columns) == prod(shape[1:]) else (rows, *columns)
    if patch.name in ("oft", "boft"):  # what these turn is the parameter itself
        rows = patch.weights[0].shape[0] * patch.weights[0].shape[1] if patch.name == "oft" else \
            patch.weights[0].shape[1] * patch.weights[0].shape[2]
        return (rows, *shape[1:])
    changes: list[tuple[int, ...]] = []

    def note(change: torch.Tensor) -> torch.Tensor:
        changes.append(tuple(change.shape))
        return change

    try:  # core's own arithmetic, on shapes alone
        comfy.lora.calculate_weight([(1.0, patch, 1.0, None, note)], torch.empty(shape, device="meta"), "a LoRA layer")
    except (RuntimeError, IndexError, ValueError):
        return None
    return changes[0] if changes else None


def apply_lora(patcher, found: LoraPatches, strengths: Mapping[str, float]):
    """Return a clone of MODEL with the patches on it, each group by its strength; 0 leaves a group alone."""
    patcher = patcher.clone()
    for group, strength in strengths.items():
        if strength == 0:
            continue
        patches = {key: patch for key, patch in found.patches.items() if group_of(key) == group}
        patcher.add_patches({key: patch for key, patch in patches.items() if not key.endswith(TABLE)}, strength)
        for key in filter(lambda key: key.endswith(TABLE), patches):  # core patches what is in a layer of its own alone
            table = patcher.get_model_object(key)
            changed = comfy.lora.calculate_weight(
                [(strength, patches[key], 1.0, None, None)], table.detach().float().clone(), key)
            patcher.add_object_patch(key, torch.nn.Parameter(changed.to(table.dtype), requires_grad=False))
    return patcher


# --- what does not fit ------------------------------------------------------------------------------------------------


def _looks_like(model, tensors: StateDict, found: LoraPatches) -> str:
    """What a file is in which nothing fits, and what to choose instead."""
    wanted = "Choose a LoRA made for Ovi, or for Wan2.2 5B (which acts on the picture)."
    width = model.diffusion_model.dim
    if found.misfits:
        key, change = next(iter(found.misfits.items()))
        wide = {size for key, shape in found.misfits.items() if re.search(r"_attn\.[qkvo]\.weight$", key)
                for size in shape or () if size != width}
        if len(wide) == 1:
            size = wide.pop()
            known = f" ({WIDTHS[size]})" if size in WIDTHS else ""
            return f"its layers are {size} wide{known}, the model's {width}. {wanted}"
        shape = list(comfy.utils.get_attr(model, key).shape)
        return (f"none of its {len(found.misfits)} layers has the right shape ({layer_of(key).removeprefix(ROOT)} is "
                f"{list(change) if change else 'inconsistent'} instead of {shape}). {wanted}")
    names = [name for name in tensors if TAIL.search(name)]
    if not names:
        return f"it is no LoRA, it holds {describe_weights(tensors)}. {wanted}"
    kind = next((what for part, what in STRANGERS if any(part in name for name in names)), "another model")
    return f"it looks like a LoRA for {kind}; no layer of Ovi has its names ({some(names)}). {wanted}"


def some(names: Iterable[str], most: int = 3) -> str:
    """A few of many names, for a sentence."""
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
