"""Guidance nodes of ComfyUI, and the two ways in which nodes of others remember: {name: MODEL -> patched MODEL}."""

from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_eps import EpsilonScaling
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_tcfg import TCFG
from comfy_extras.nodes_video_model import VideoLinearCFGGuidance


class Momentum:
    """As popular guidance packs keep their running average."""

    def __init__(self):
        self.average = 0.0

    def update(self, value):
        self.average = value + 0.5 * self.average
        return self.average


def with_object(model):
    momentum = Momentum()

    def before(args):
        cond, uncond = args["conds_out"]
        return [uncond + momentum.update(cond - uncond), uncond]

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(before)
    return model


def with_dictionary(model):
    """Two functions that share what they remember."""
    state = {}

    def before(args):
        state["average"] = args["conds_out"][0] + 0.5 * state.get("average", 0.0)
        return args["conds_out"]

    def after(args):
        return args["denoised"] + 0.1 * state["average"] * args["cond_scale"]

    model = model.clone()
    model.set_model_sampler_pre_cfg_function(before)
    model.set_model_sampler_post_cfg_function(after)
    return model


NODES = {
    "RescaleCFG": lambda m: RescaleCFG().patch(m, 0.7)[0],
    "CFGZeroStar": lambda m: CFGZeroStar.execute(m).result[0],
    "APG": lambda m: APG.execute(m, 0.5, 5.0, -0.5).result[0],
    "CFGNorm": lambda m: CFGNorm.execute(m, 0.9).result[0],
    "CFGNorm before": lambda m: CFGNorm.execute(m, 0.9, True).result[0],
    "TCFG": lambda m: TCFG.execute(m).result[0],
    "Mahiro": lambda m: Mahiro.execute(m).result[0],
    "FreSca": lambda m: FreSca.execute(m, 0.8, 1.25, 1).result[0],
    "EpsilonScaling": lambda m: EpsilonScaling.execute(m, 1.05).result[0],
    "VideoLinearCFGGuidance": lambda m: VideoLinearCFGGuidance().patch(m, 1.5)[0],
    "several": lambda m: CFGZeroStar.execute(APG.execute(RescaleCFG().patch(m, 0.7)[0], 0.5, 5.0, -0.5).result[0]
                                             ).result[0],
    "object": with_object,
    "dictionary": with_dictionary,
}
