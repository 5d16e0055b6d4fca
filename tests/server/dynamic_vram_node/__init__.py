"""A custom node that only switches DynamicVRAM on, in a server that computes on the CPU (`test_server_dynamic.py`)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from support import loading_state

loading_state.switch_on()
NODE_CLASS_MAPPINGS: dict = {}
