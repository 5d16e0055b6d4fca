"""The key layouts Ovi checkpoints circulate in, and their common form: core's names and quantisation records.

| layout | video tower | audio tower | seen in |
|---|---|---|---|
| upstream | `video_model.*` | `audio_model.*` | chetwinlow1/Ovi, DreamID-Omni, fp8 casts |
| split (two files) | root or `video_model.*` | `audio_model.*` or root | Kijai, DeepBeepMeep |
| core | root | `audio_model.*` | converted files |

Any of them may sit below a wrapper (`module.`, `model.diffusion_model.`, ...) and may hold bf16, fp16, fp32, fp8
without scales, fp8 with `.scale_weight`, core's own records (`.comfy_quant`, or in the metadata), or quanto's int8
(`._data` and `._scale`). Nothing here reads files or builds models.
"""

import re

from ..files.identify import describe_weights
from ..files.quant_records import check_records, convert_quanto_int8, mark_plain_fp8, resolve_records
from ..files.reader import StateDict

VIDEO_PREFIX, AUDIO_PREFIX = "video_model.", "audio_model."

WANTED = ("Choose an Ovi checkpoint, such as model_960x960.safetensors from chetwinlow1/Ovi on Hugging Face, in "
          "models/diffusion_models.")

# The first tensor of a tower: video's convolution is a module of its own, audio's the first of a sequence.
_LANDMARK = re.compile(r"(?P<wrapper>(?:.*?\.)??)(?P<tower>video_model\.|audio_model\.)?patch_embedding\."
                       r"(?P<audio>0\.)?weight")


def read_towers(tensors: StateDict, metadata: dict[str, str], name: str) -> tuple[StateDict, str]:
    """Bring the tensors of one file to core's names and quantisation records.

    Returns (tensors, layout), layout one of "upstream", "core", "video tower", "audio tower"; the video tower's names
    start at the root, the audio tower's with `audio_model.`. Raises RuntimeError, naming what the file is instead, if
    it holds neither tower.
    """
    wrapper, video_prefix, audio_prefix = find_towers(tensors)
    if video_prefix is None and audio_prefix is None:
        raise RuntimeError(f"{name} is no Ovi checkpoint: it holds {describe_weights(tensors)}. {WANTED}")
    tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    # Core's quantisation records name layers by their names in the file: resolve them before any key is renamed.
    tensors = resolve_records(tensors, metadata, name, wrapper)
    if audio_prefix == "":  # an audio tower alone, at the root
        return finish({AUDIO_PREFIX + key: value for key, value in tensors.items()}, name), "audio tower"
    if audio_prefix is None:
        layout = "video tower"
    elif video_prefix is None:
        layout = "audio tower"
    else:
        layout = "upstream" if video_prefix else "core"
    return finish({key.removeprefix(VIDEO_PREFIX): value for key, value in tensors.items()}, name), layout


def find_towers(tensors: StateDict) -> tuple[str, str | None, str | None]:
    """Return (wrapper, video prefix, audio prefix): what stands before each tower's names, None if it is not there."""
    wrapper, video, audio = "", None, None
    for key in tensors:
        match = _LANDMARK.match(key)
        if match is None:
            continue
        wrapper = match["wrapper"]
        if match["audio"]:
            audio = match["tower"] or ""
        else:
            video = match["tower"] or ""
    return wrapper, video, audio


def finish(tensors: StateDict, name: str) -> StateDict:
    """Core's table names, then core's records for what other programs quantised."""
    tensors = {key.replace(".modulation.modulation", ".modulation"): value for key, value in tensors.items()}
    tensors = mark_plain_fp8(convert_quanto_int8(tensors))
    check_records(tensors, name)
    return tensors


# --- what a record promises -------------------------------------------------------------------------------------------
