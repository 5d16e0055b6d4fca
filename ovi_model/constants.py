"""What stays the same through the steps of one sampling, computed once: texts as keys and values, rotary tables.

Held by the model and dropped when the sampling ends, however it ends. Nothing is kept while training or outside a
sampling, where nobody would say when it ends.
"""

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from .model import EncodedText, audio_clock

UNNAMED = -1
"""Id of a text that may read differently in another step, because its weights change (LoRA hooks)."""
KEY = "ovi_constants"


class SamplingConstants:
    """The constants of the sampling that a model is at work on; `base` is that OviBaseModel (not kept: no cycle)."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.texts: dict[int, EncodedText] = {}
        self.rope: tuple = (None, None)  # what the tables depend on, the tables

    def keep(self, base) -> bool:
        """Whether a sampling is going on, so that results may be kept; makes sure that its end is noticed."""
        patcher = base.current_patcher
        if patcher is None or torch.is_grad_enabled():
            return False
        if forget not in patcher.get_callbacks(CallbacksMP.ON_CLEANUP, KEY):
            patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, forget)
        return True

    def text_rows(self, base, x: Tensor, ids: list[int] | None, context: Tensor, audio_context: Tensor):
        """Return for each batch row its encoded text, or None if texts are not to be kept.

        ids name the texts, rows of context and audio_context [B, L, C]. x [B, 1, n] is the packed latent: what it needs
        of the memory comes first.
        """
        if not ids or UNNAMED in ids or not self.keep(base):
            return None
        missing = {name: row for row, name in enumerate(ids) if name not in self.texts}
        if missing:
            needed = base.memory_required(list(x.shape)) + len(missing) * base.text_memory()
            if needed > base.current_patcher.get_free_memory(x.device):
                return None
        dtype = base.get_dtype_inference()
        for name, row in missing.items():
            self.texts[name] = base.diffusion_model.encode_text(*(
                comfy.model_management.cast_to_device(text[row:row + 1], x.device, dtype)
                for text in (context, audio_context)))
        return [self.texts[name] for name in ids]

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
