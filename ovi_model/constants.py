"""What stays the same through the steps of one sampling, computed once: texts as keys and values, rotary tables.

Held by the model and dropped when the sampling ends, however it ends. Nothing is kept while training or outside a
sampling, where nobody would say when it ends.
"""

import itertools
import math
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from .model import EncodedText, audio_clock

KEY = "ovi_constants"
NUMBERS = itertools.count()


@dataclass(frozen=True)
class TextName:
    """Stands for one row of the texts of one conditioning in one sampling."""

    number: int
    video_tokens: int  # without padding
    audio_tokens: int


def name_texts(text: Tensor, audio_text: Tensor) -> list[TextName]:
    """Name the rows of a conditioning's texts [n, L, C] for video and audio; the shorter list repeats.

    Padding is rows of zeros. Waits for the device if the texts are on one.
    """
    video, audio = own_tokens(text), own_tokens(audio_text)
    return [TextName(next(NUMBERS), video[i % len(video)], audio[i % len(audio)])
            for i in range(math.lcm(len(video), len(audio)))]


def own_tokens(text: Tensor) -> list[int]:
    """Number of tokens of each row of text [n, L, C] up to the last that is not zero."""
    used = text.any(dim=-1) * torch.arange(1, text.shape[1] + 1, device=text.device)
    return used.amax(dim=1).tolist()


class SamplingConstants:
    """The constants of the sampling that a model is at work on; `base` is that OviBaseModel (not kept: no cycle)."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.texts: dict[TextName, EncodedText] = {}
        self.rope: tuple = (None, None)  # what the tables depend on, the tables

    def keep(self, base) -> bool:
        """Whether a sampling is going on, so that results may be kept; makes sure that its end is noticed."""
        patcher = base.current_patcher
        if patcher is None or torch.is_grad_enabled():
            return False
        if forget not in patcher.get_callbacks(CallbacksMP.ON_CLEANUP, KEY):
            patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, forget)
        return True

    def text_rows(self, base, x: Tensor, names: list[TextName] | None, context: Tensor, audio_context: Tensor):
        """Return for each batch row its encoded text, or None if texts are not to be kept.

        names stand for the rows of context and audio_context [B, L, C]; if there are more or fewer, a wrapper of the
        model's call has divided the batch, and nobody knows whose these rows are. x [B, 1, n] is the packed latent:
        what it needs of the memory comes first.
        """
        if not names or len(names) != len(x) or not self.keep(base):
            return None
        if "model_function_wrapper" in base.current_patcher.model_options:  # some change the texts from step to step
            return None
        missing = {name: row for row, name in enumerate(names) if name not in self.texts}
        if missing:
            needed = base.memory_required(list(x.shape)) + sum(map(base.text_memory, missing))
            if needed > base.current_patcher.get_free_memory(x.device):
                return None
        for name, row in missing.items():
            video, audio = context[row:row + 1, :name.video_tokens], audio_context[row:row + 1, :name.audio_tokens]
            self.texts[name] = base.diffusion_model.encode_text(*(
                comfy.model_management.cast_to_device(text, x.device, base.get_dtype_inference())
                for text in (video, audio)))
        return [self.texts[name] for name in names]

    def rope_tables(self, base, shapes: list, device, transformer_options) -> tuple[Tensor, Tensor]:
        """Return the rotary tables (video, audio) for streams of `shapes`."""
        scaling = transformer_options.get("rope_options") or {}
        depends_on = (*shapes[0][2:], shapes[1][2], device, audio_clock(transformer_options), *scaling.items())
        if depends_on == self.rope[0]:
            return self.rope[1]
        tables = base.diffusion_model.rope_tables(shapes, device, transformer_options)
        if self.keep(base):
            self.rope = (depends_on, tables)
        return tables


def forget(patcher) -> None:
    """Drop what was kept for the sampling that has ended (core calls this also after an error or an interruption)."""
    patcher.model.constants.clear()
