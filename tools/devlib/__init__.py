"""The parts of `tools/dev.py`; all but `client`, `session` and `workflows.to_api` need only the standard library.

- `common`: paths, the one-sentence error, sub-processes, the lock.
- `environment`: `.venv` with its pins, and the stamp that says it is complete.
- `comfyui`: finding, fetching and linking ComfyUI; the run directory.
- `server`: a real ComfyUI server as a context manager, started through `launch`, which ends it with its
  starter. `client`: talking to it. Both serve the tests as well.
- `workflows`: UI to API conversion, the inputs that `--tiny` and the demo's options set.
- `weights`: which weight files are whose, the tiny bundle. `fetch`: listing and downloading real ones.
- `pack`: the pack and ComfyUI imported into this process.
- `session`: demo, run and serve. `checks`: test. `cli`: the command line.
"""
