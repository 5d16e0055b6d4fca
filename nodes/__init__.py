"""The pack's node surface: ComfyUI V3 nodes over `ovi_model`."""

from comfy_api.latest import ComfyExtension, io

from ..ovi_model import seam
from .decode import OviDecode
from .latents import OviEmptyLatent, OviFirstFrame
from .loaders import OviAudioVAELoader, OviModelLoader, OviTextEncoderLoader
from .prompt import OviPrompt
from .sampling import OviAudioGuidance, OviGuider, OviSampler, OviSchedule, OviSkipLayer, OviSolver

NODES: list[type[io.ComfyNode]] = [
    OviModelLoader, OviTextEncoderLoader, OviAudioVAELoader,
    OviPrompt, OviSkipLayer,
    OviEmptyLatent, OviFirstFrame,
    OviSampler, OviGuider, OviAudioGuidance, OviSolver, OviSchedule,
    OviDecode,
]


class OviExtension(ComfyExtension):
    """Registers the nodes, and the model with core's own detection list."""

    async def on_load(self) -> None:
        seam.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
