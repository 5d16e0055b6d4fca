"""The texts a sampling reads: each row its own, padding dropped, whatever changes them, and what is lost is said."""

import itertools

import comfy.sd
import folder_paths
import pytest
import torch
import torch._dynamo.testing
from comfy.ldm.modules.attention import attention_pytorch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookLora
from nodes import ConditioningConcat
from ovi_native.nodes.sampling import OviSampler
from ovi_native.ovi_model.ovi.conditioning import AUDIO_TEXT_KEY, text_tokens_cut
from ovi_native.ovi_model.ovi.guider import make_guider
from ovi_native.ovi_model.ovi.towers import fit_text
from ovi_native.ovi_model.sampling import solvers, step_cache
from safetensors.torch import save_file
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close
from tiny.inputs import conditioning, first_frame_mask, joint, noise, text
from tiny.models import load


@pytest.fixture(scope="module")
def weights():
    return draw_weights()


def sample(patcher, positive=None, negative=None, steps=3, clips=1, solver="unipc"):
    latent = joint(2, 2, 2, seed=5, batch=clips)
    guider = make_guider(patcher, positive or conditioning(4, 1),
                                  negative or conditioning(3, 2, audio_tokens=3), 4.0, 3.0, 1)
    return guider.sample(joint(2, 2, 2, seed=6, batch=clips), latent, solvers.make_sampler(solver),
                         solvers.make_sigmas(solver, steps), denoise_mask=first_frame_mask(latent), disable_pbar=True)


def assert_differs(found, other, least=1e-3):
    with pytest.raises(AssertionError):
        assert_pair_close(found, other, least)


def padded(cond: list, length: int = 512) -> list:
    """As core's own text node hands a text over."""
    return [[fit_text(text, length), options] for text, options in cond]


# --- whose text, and changed by whom ----------------------------------------------------------------------------------

def test_each_clip_of_a_batch_reads_its_own_text(weights):
    patcher = load(weights)
    (short, options), (long, _) = conditioning(4, 1)[0], conditioning(300, 7)[0]
    rows = torch.cat([fit_text(short, 300), long])
    found = sample(patcher, positive=[[rows, options]], clips=2)
    for row, each in enumerate((short, long)):
        alone = sample(patcher, positive=[[each, options]], clips=2)
        assert_pair_close([x[row] for x in found.unbind()], [x[row] for x in alone.unbind()], 1e-5)
    assert_differs(found, sample(patcher, positive=[[rows.flip(0), options]], clips=2))


def replace_context(executor, x, t, context, options, **kwargs):
    """A wrapper around the network that has another text for both towers in every step after the first."""
    factor = 1.0 if float(t[0]) > 900 else 0.0
    return executor(x, t, context * factor, options, **{**kwargs, "audio_context": kwargs["audio_context"] * factor})


def fade_in(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **conds):  # noqa: B006
    """A wrapper around the model's call, as nodes have that anneal the conditioning."""
    factor = 1 - float(t[0])
    return executor(x, t, c_concat, c_crossattn * factor, control, transformer_options,
                    **{**conds, "audio_context": conds["audio_context"] * factor})


def fade_in_function(apply_model, args):
    conds, factor = args["c"], 1 - float(args["timestep"][0])
    texts = {name: conds[name] * factor for name in ("c_crossattn", "audio_context")}
    return apply_model(args["input"], args["timestep"], **{**conds, **texts})


def with_wrapper(patcher, kind, wrapper):
    patcher = patcher.clone()
    if kind is None:
        patcher.set_model_unet_function_wrapper(wrapper)
    else:
        patcher.add_wrapper(kind, wrapper)
    return patcher


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_wrappers_may_change_the_texts_from_step_to_step(weights, solver):
    """Around the network, around the model, and the function that stands for it: one step at a time tells the same."""
    plain = load(weights)
    faded = sample(with_wrapper(plain, WrappersMP.APPLY_MODEL, fade_in), solver=solver)
    assert_differs(faded, sample(plain, solver=solver))
    assert_pair_close(faded, sample(with_wrapper(plain, None, fade_in_function), solver=solver), 1e-6)
    replaced = with_wrapper(plain, WrappersMP.DIFFUSION_MODEL, replace_context)
    assert_differs(sample(replaced, solver=solver), sample(plain, solver=solver))


@pytest.mark.parametrize("kind", [WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL])
def test_a_text_that_a_wrapper_puts_in_is_the_text(weights, kind):
    """The same as sampling with it, under the step cache too."""
    other = conditioning(9, 40)
    given = fit_text(other[0][0], 512)

    def around_network(executor, x, t, context, options, **kwargs):
        context = given.expand_as(context)
        return executor(x, t, context, options, **{**kwargs, "audio_context": context})

    def around_model(executor, x, t, c_concat, c_crossattn, control, options, **conds):
        context = given.expand_as(c_crossattn)
        return executor(x, t, c_concat, context, control, options, **{**conds, "audio_context": context})

    plain = load(weights)
    changed = with_wrapper(plain, kind, around_network if kind == WrappersMP.DIFFUSION_MODEL else around_model)
    for prepare in (lambda patcher: patcher,
                    lambda patcher: step_cache.set_step_cache(patcher, step_cache.Settings(0.5, 0.5, 0.0, 1.0))):
        assert_pair_close(sample(prepare(changed), steps=6), sample(prepare(plain), other, other, steps=6), 1e-5)


def test_a_wrapper_may_join_more_text_than_is_read(weights):
    """Two padded texts of 512 rows, joined inside the model's call."""
    more = fit_text(text(9, 40), 512)

    def join(executor, x, t, context, options, **kwargs):
        joined = torch.cat([context, more.expand_as(context)], dim=1)
        return executor(x, t, joined, options, **{**kwargs, "audio_context": joined})

    plain, positive = load(weights), conditioning(4, 1)
    expected = [[torch.cat([positive[0][0], text(9, 40)], dim=1), {"pooled_output": None}]]
    assert_pair_close(sample(with_wrapper(plain, WrappersMP.DIFFUSION_MODEL, join), positive, positive),
                      sample(plain, expected, expected), 1e-5)


def test_a_wrapper_that_divides_the_batch_gets_each_row_its_own_text(weights):
    def row_by_row(executor, x, t, concat, text, control, options, **conds):
        return torch.cat([executor(x[i:i + 1], t[i:i + 1], concat, text[i:i + 1], control, options, **{
            key: value[i:i + 1] if torch.is_tensor(value) else value for key, value in conds.items()})
            for i in range(len(x))])

    def run(patcher):
        guider = make_guider(patcher, conditioning(4, 1), conditioning(3, 2, audio_tokens=3), 4.0, 3.0)
        return guider.sample(joint(2, 2, 2, seed=6), joint(2, 2, 2, seed=5), solvers.make_sampler("euler"),
                             solvers.make_sigmas("euler", 2), disable_pbar=True)

    whole = load(weights)
    assert_pair_close(run(with_wrapper(whole, WrappersMP.APPLY_MODEL, row_by_row)), run(whole), 1e-5)


def test_a_lora_on_the_text_s_layers_holds_as_hook_and_merged(weights, tmp_path, monkeypatch):
    """Hooks change the weights while a sampling runs: nothing made of the text may outlive a pass."""
    layers = ("text_embedding.0", "blocks.0.cross_attn.k", "audio_model.text_embedding.2",
              "audio_model.blocks.1.cross_attn.v")
    shapes = {"text_embedding.0": (256, 64)}
    lora = {}
    for seed, layer in enumerate(layers):
        rows, columns = shapes.get(layer, (256, 256))
        lora[f"diffusion_model.{layer}.lora_up.weight"] = noise(rows, 4, seed=seed)
        lora[f"diffusion_model.{layer}.lora_down.weight"] = noise(4, columns, seed=seed + 9) * 0.1
    save_file(lora, tmp_path / "hook.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    hooks, = CreateHookLora().create_hook("hook.safetensors", 1.0, 0.0)
    conds = conditioning(4, 1), conditioning(3, 2, audio_tokens=3)
    hooked = [ConditioningSetProperties().set_properties(cond, 1.0, "default", hooks=hooks)[0] for cond in conds]
    patcher = load(weights)
    merged = sample(comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0], *conds)
    plain = sample(patcher, *conds)
    assert_pair_close(sample(patcher, *hooked), merged, 1e-5)
    assert_pair_close(sample(patcher, *conds), plain, 1e-6)  # and goes when the hook goes
    assert_differs(merged, plain)


@pytest.mark.slow
def test_a_compiled_network_reads_the_text_of_each_run(weights):
    patcher, compiled = load(weights), load(weights)
    for each in (patcher, compiled):  # PyTorch's attention, as on GPUs; what ComfyUI uses on a CPU does not compile
        each.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs))
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    set_torch_compile_wrapper(model=compiled, backend=counter, fullgraph=True)
    for seed in (1, 9):
        assert_pair_close(sample(compiled, conditioning(4, seed)), sample(patcher, conditioning(4, seed)), 1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- padding, joined texts, and what is too long ----------------------------------------------------------------------

@pytest.mark.parametrize("tokens", [1, 130, 511, 512])
def test_padding_makes_no_difference(weights, tokens):
    patcher, positive = load(weights), conditioning(tokens, 1)
    expected = sample(patcher, positive)
    for length in (512, 600, 1024):
        assert_pair_close(sample(patcher, padded(positive, length)), expected, 1e-6)


@pytest.mark.parametrize("stock", [True, False])
def test_joined_texts_are_both_read(weights, stock):
    """Core's text node pads to 512 rows, 'Ovi Prompt' does not."""
    patcher = load(weights)
    first, second = conditioning(7, 1), conditioning(9, 2)
    expected = sample(patcher, [[torch.cat([first[0][0], second[0][0]], dim=1), {"pooled_output": None}]])
    prepare = padded if stock else list
    joined, = ConditioningConcat().concat(prepare(first), prepare(second))
    assert joined[0][0].shape[1] == (1024 if stock else 16)
    assert_pair_close(sample(patcher, joined), expected, 1e-5)
    assert_differs(expected, sample(patcher, first))
    assert text_tokens_cut(joined) == []


def test_rows_of_zeros_go_wherever_they_stand():
    rows = text(600, 1)
    rows[:, 100:250] = 0
    found = fit_text(torch.cat([rows, rows.flip(1)]), 512)
    assert torch.equal(found[0, :450], torch.cat([rows[0, :100], rows[0, 250:]]))
    assert torch.equal(found[1, :450], torch.cat([rows[0, :100], rows[0, 250:]]).flip(0))
    assert not found[:, 450:].any() and found.shape[1] == 512
    short = rows[:, :300]  # what fits stays as it is, row for row
    assert torch.equal(fit_text(short, 512)[:, :300], short)


@pytest.mark.parametrize("own_sound", [False, True])
def test_what_is_cut_is_said(weights, caplog, own_sound):
    patcher = load(weights)
    extra = {AUDIO_TEXT_KEY: text(5, 3)} if own_sound else {}
    long, = ConditioningConcat().concat(padded(conditioning(400, 1, **extra)), padded(conditioning(300, 2)))
    sentences = text_tokens_cut(long)
    assert len(sentences) == 1 and sentences[0].startswith("The picture's text" if own_sound else "The text")
    assert "has 700 tokens" in sentences[0] and "the last 188 have no effect" in sentences[0]
    sample(patcher, long, steps=1)
    assert [record.message for record in caplog.records if "tokens" in record.message] == sentences
    assert text_tokens_cut(conditioning(512, 1)) == text_tokens_cut(padded(conditioning(500, 1), 600)) == []


@pytest.mark.parametrize(("wrong", "found"), [
    (torch.zeros(1, 0, 64), r"got one of shape \[1, 0, 64\]"), (torch.zeros(1, 4, 0), r"got one of shape \[1, 4, 0\]"),
    (torch.zeros(4, 64), r"got one of shape \[4, 64\]"), (None, "got none"),
])
def test_a_conditioning_without_a_text_gets_a_sentence(weights, wrong, found):
    with pytest.raises(ValueError, match=f"holds no text that Ovi can read: .*{found}.*'Ovi Prompt'"):
        sample(load(weights), [[wrong, {}]])


def test_stock_and_own_encodings_batch_together(weights):
    """Whatever the lengths of the two prompts, one pass serves both."""
    patcher = load(weights)
    results = [sample(patcher, a(conditioning(4, 1)), b(conditioning(3, 2, audio_tokens=3)))
               for a, b in itertools.product((list, padded), repeat=2)]
    for other in results[1:]:
        assert_pair_close(other, results[0], 1e-6)


def test_the_sampler_node_shows_what_is_cut(weights):
    latent = {"samples": joint(2, 2, 2)}
    shown = OviSampler.execute(load(weights), conditioning(600, 1), conditioning(3, 2), latent, 1, 1, "euler", 5.0, 4.0,
                               3.0, -1, 1.0).ui.as_dict()["text"][0]
    assert "600" in shown and "512" in shown
