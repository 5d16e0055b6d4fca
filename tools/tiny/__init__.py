"""Small random models, and inputs for them: what the demo, the tests and the benchmarks run where no weights are.

- `sizes`: the joint checkpoint's sizes and the one list of its tensors (standard library only).
- `draws`, `checkpoint`, `text_encoder`, `video_vae`, `audio`, `bundle`: the files that `tools/make_tiny.py` writes
  (torch, sentencepiece).
- `models`, `inputs`, `compare`, `wan_vae`, `fake_gpu`: MODEL, VAE, CONDITIONING and latents in memory, errors between
  results, and a GPU without numbers; they need ComfyUI and the pack (`devlib.pack.import_pack`).
"""
