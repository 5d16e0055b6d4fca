"""The copy of a MODEL that is trained: ComfyUI loads it anew from the same files, and lets it go at
the end."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import comfy.model_management
import torch

from ..files.disk import human
from .network import training_mode
from .run import OUT_OF_MEMORY

T = TypeVar("T")


@contextlib.contextmanager
def copy_to_train(patcher) -> Iterator:
    """A static copy of a MODEL, in whole on its device, which nothing else uses; gone afterwards.

    RuntimeError if the MODEL cannot be loaded again, or does not fit. Weights that stay on the CPU
    could not be used: the backward pass needs them once more, when their place on the device has
    long been given to others.
    """
    if patcher.cached_patcher_init is None:
        raise RuntimeError("This MODEL does not know its files, so it cannot be loaded for "
                           "training. Connect one from 'Load Ovi Model', with LoRA on it or not.")
    copy = patcher.clone(disable_dynamic=True, force_deepcopy=True)
    copy.parent = None  # or the memory it takes is counted as its parent's when it is gone
    try:
        copy.model.requires_grad_(False)
        comfy.model_management.load_models_gpu([copy], memory_required=1e20, force_full_load=True)
        if copy.model.model_lowvram:
            raise RuntimeError(f"The model's weights ({human(copy.model_size())}) do not fit on "
                               f"{copy.load_device} in whole, as training needs them. Load them in "
                               "fp8 or int8 ('Load Ovi Model', weight_dtype), and close what else "
                               "uses the device.")
        yield copy
    finally:
        comfy.model_management.unload_model_and_clones(copy)
        del copy
        gc.collect()
        comfy.model_management.soft_empty_cache()


def train_copy(patcher, dataset, train: Callable[[Any], T]) -> T:
    """What `train` makes of a copy of a MODEL. RuntimeError in words if memory runs out, ValueError
    for clips it cannot read."""
    with training_mode():
        check_fit(patcher, dataset)
        try:
            with copy_to_train(patcher) as copy:
                return train(copy)
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
    # of a step there are words already
    raise RuntimeError(OUT_OF_MEMORY.format(step=1, kept="").strip())


def check_fit(patcher, dataset) -> None:
    """ValueError in words unless a data set's clips are what the model reads."""
    width = dataset.draw(1, torch.Generator().manual_seed(0)).text.shape[-1]
    network = patcher.model.diffusion_model
    if width != network.text_dim:
        raise ValueError(f"The dataset's captions were encoded {width} wide, but this model reads "
                         f"text that is {network.text_dim} wide. Make the dataset with the text "
                         "encoder of this model.")
