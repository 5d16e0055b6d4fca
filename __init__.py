"""Ovi Native: joint audio-video generation with ComfyUI's own samplers, memory manager and VAEs."""

import re

MINIMUM_COMFYUI = (0, 30, 0)
WEB_DIRECTORY = "./web"


def check_comfyui(found: str) -> None:
    """Raise ImportError with a sentence for the log if ComfyUI is older than this pack needs."""
    numbers = [int(digits) for digits in re.findall(r"\d+", found)]  # "0.30", "v0.30.0" and "0.30.0rc1" count too
    if (*numbers, 0, 0, 0)[:3] < MINIMUM_COMFYUI:
        needed = ".".join(map(str, MINIMUM_COMFYUI))
        raise ImportError(f"Ovi Native needs ComfyUI {needed} or newer, but this is {found}. "
                          "Update ComfyUI (Manager: 'Update ComfyUI'), then restart it.")


async def comfy_entrypoint():
    """ComfyUI's entry point for V3 extensions."""
    from comfyui_version import __version__

    check_comfyui(__version__)
    from .nodes import OviExtension

    return OviExtension()
