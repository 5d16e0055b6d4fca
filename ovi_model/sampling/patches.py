"""Patches that nodes leave in a MODEL's options: which of them a network heeds, and which are idle.

Core's network of Wan offers nodes one place inside a block, after self-attention (`attn1_patch`),
and a network as a whole lets its blocks be replaced. UNets and other networks offer many more; a
node made for those leaves a patch that is never called.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

OUTPUT, WAN_OUTPUT = "attn1_output_patch", "attn1_patch"
HEEDED = (WAN_OUTPUT, OUTPUT)


@dataclass(frozen=True)
class PatchPlaces:
    """Where a family's network, made of core's Wan, lets other nodes in."""

    family: str  # its name in sentences
    block: str  # core's name for its kind of block
    blocks: int


def patches_of(transformer_options: dict, places: PatchPlaces) -> Iterator[tuple[Any, str, bool]]:
    """All patches in the options as (function, name of its place, whether the network has it)."""
    for name, patches in transformer_options.get("patches", {}).items():
        yield from ((patch, name, name in HEEDED) for patch in patches)
    for kind, replacements in transformer_options.get("patches_replace", {}).items():
        for place, patch in replacements.items():
            block, number = place[0], place[1]
            heeded = kind == "dit" and block == places.block and number in range(places.blocks)
            yield patch, f"{'' if kind == 'dit' else f'{kind} of '}{block} {number}", heeded


def name_of(patch: Any) -> str:
    """The node that made a function: most nodes define it in a method of the node's class."""
    patch = getattr(patch, "func", patch)
    return getattr(patch, "__qualname__", type(patch).__qualname__).split(".")[0]


def idle_patches(transformer_options: dict, places: PatchPlaces) -> str | None:
    """One sentence that names what in a MODEL's options changes nothing; None if all of it does.

    A node that patches several places, some of which exist, has an effect.
    """
    heeded: set[str] = set()
    idle: dict[str, list[str]] = {}
    for patch, place, exists in patches_of(transformer_options, places):
        if exists:
            heeded.add(name_of(patch))
        else:
            idle.setdefault(name_of(patch), []).append(place)
    names = [f"{name} ({', '.join(dict.fromkeys(where))})" for name, where in idle.items()
             if name not in heeded]
    if not names:
        return None
    family, blocks = places.family, f"{places.block.replace('_', ' ')}s 0 to {places.blocks - 1}"
    return (f"Without effect on {family}: {'; '.join(names)}. {family}'s network lacks the places "
            f"that this MODEL's patches are for; it has the {blocks} and the output of "
            "self-attention. Take their nodes out.")


def offer_attention_outputs(options: dict) -> None:
    """Call patches on self-attention's output (as 'NAGuidance') where Wan's network offers it."""
    transformer_options = options.get("transformer_options", {})
    patches = transformer_options.get("patches", {})
    if patches.get(OUTPUT):
        adapted = [partial(patch_output, patch) for patch in patches[OUTPUT]]
        options["transformer_options"] = {**transformer_options, "patches": {
            **patches, WAN_OUTPUT: [*patches.get(WAN_OUTPUT, []), *adapted]}}


def patch_output(patch: Callable, args: dict):
    """Hand the output of self-attention [B, N, D] to a patch as other networks do."""
    heads, width = args["q"].shape[2:]
    return patch(args["x"], {**args["transformer_options"], "n_heads": heads, "dim_head": width})
