"""The pack's node surface: ComfyUI V3 nodes over `ovi_model`."""

import logging
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from ..ovi_model.ovi import supported_models
from ..server import folders
from ..server.downloads import register
from .clips import OviLoadLatent, OviRepeatClips, OviSaveLatent, OviSelectClips
from .decode import OviDecode, OviDecodeVideo
from .latents import OviEmptyLatent, OviFirstFrame
from .loaders import OviAudioVAELoader, OviModelLoader, OviTextEncoderLoader, OviVAELoader
from .lora import OviLoraLoader
from .prompt import OviPrompt
from .sampling import OviAudioGuidance, OviGuider, OviSampler, OviSchedule, OviSkipLayer, OviSolver
from .sound import OviFitSound, OviFitSoundLatent
from .speed import OviAttention, OviFast, OviGuidanceRange, OviStepCache
from .training import OviDataset
from .training_lora import OviTrainLora
from .weights import OviWeights

NODES: list[type[io.ComfyNode]] = [
    OviModelLoader, OviTextEncoderLoader, OviAudioVAELoader,
    OviPrompt, OviSkipLayer,
    OviEmptyLatent, OviFirstFrame,
    OviSampler, OviGuider, OviAudioGuidance, OviSolver, OviSchedule,
    OviDecode, OviDecodeVideo,
    OviWeights,
    OviFast, OviAttention, OviStepCache, OviGuidanceRange,
    OviFitSound, OviFitSoundLatent,
    OviSaveLatent, OviLoadLatent, OviSelectClips, OviRepeatClips,
    OviLoraLoader,
    OviDataset,
    OviTrainLora,
    OviVAELoader,
]


class OviExtension(ComfyExtension):
    """Registers the nodes, the model with core's own detection list, and the routes behind 'Ovi Weights'."""

    async def on_load(self) -> None:
        from server import PromptServer  # only inside a running ComfyUI, where it is loaded already

        supported_models.register()
        register(PromptServer.instance.routes, PromptServer.instance.send_sync)
        pack = Path(__file__).parent.parent
        folders.register(PromptServer.instance.routes, pack)
        if problem := folders.problem(pack.name):
            logging.warning(problem)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
