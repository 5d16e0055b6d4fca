"""Which weight files a workflow with one variant needs, and which of them ComfyUI's folders hold."""

from ..files import model_folders
from ..files.catalogue import Need, WeightFile
from ..files.safetensors_header import read_metadata
from .catalogue import DEFAULT_PRECISION, ROLES, found_for, needed_files
from .variants import VARIANT_KEY


def needs(variant: str, precision: str = DEFAULT_PRECISION) -> list[Need]:
    """One Need for each role; ValueError for a variant or precision that is not one of ours. Reads the disk.

    A model of another precision counts as present: `precision` only says which one to download.
    """
    files = needed_files(variant, precision)
    held = {folder: model_folders.held(folder) for folder in {file.folder for file in files}}

    def need(file: WeightFile) -> Need:
        paths = held[file.folder]
        found = found_for(file, variant, list(paths), lambda name: read_metadata(paths[name], VARIANT_KEY))
        return Need(file, ROLES[file.role], found, model_folders.partial_bytes(model_folders.target(file)))

    return [need(file) for file in files]
