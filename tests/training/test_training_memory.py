"""The estimate of what training takes, against the highest point of a step on tensors without data."""

import pytest
import torch
from ovi_native.ovi_model.training.lora import LoraSettings
from ovi_native.ovi_model.training.memory import Shape
from tiny.fake_gpu import train_on_fake_gpu
from tiny.sizes import Sizes, core_layout, tensor_shapes


def released(blocks: int) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta", dtype=torch.bfloat16)
            for name, shape in core_layout(tensor_shapes(Sizes(heads=24, blocks=blocks, ffn=14336, text=4096))).items()}


@pytest.mark.parametrize("blocks, kept", [(2, 0), (2, 2)])
def test_activations_at_the_released_width(blocks, kept):
    tokens = (31, 22, 22)
    peak = train_on_fake_gpu(tokens, blocks, kept)
    estimate = Shape.of(released(blocks)).activations(31 * 22 * 22, kept)
    assert estimate == pytest.approx(peak, rel=0.06), f"estimate {estimate / 2**30:.2f}, peak {peak / 2**30:.2f} GiB"


def test_weights_and_what_is_trained():
    tensors = released(30)
    shape = Shape.of(tensors)
    assert (shape.dim, shape.ffn, shape.blocks) == (3072, 14336, 30) and len(shape.layers) == 2 * 30 * 12
    assert shape.weights == 2 * 11_660_753_108
    assert Shape.of(tensors, "fp8_scaled").weights == pytest.approx(12.4e9, rel=0.01)
    assert shape.lora(LoraSettings(32)) == 2 * shape.lora(LoraSettings(32, towers="audio")) == 184_811_520
    need = shape.need(15004, 184_811_520)
    assert need.trained == 16 * 184_811_520 and need.total == need.weights + need.trained + need.activations
    whole = shape.need(15004, 5_666_918_400, full=True)  # the fusion stage in bf16: gradients and twice AdamW's state
    assert whole.trained == 6 * 5_666_918_400 and whole.total < 80 << 30
    assert Shape.of(tensors, "fp32").need(1, 10, full=True, average=True).trained == 160
    assert str(need).startswith("33.3 GB: weights 23.3 GB, what is trained 3.0 GB")
    assert shape.need(2 * 15004, 1).activations == pytest.approx(2 * need.activations, abs=1)
