"""The benchmarks at tiny sizes: each runs, its JSON is complete, and its counts are those computed by hand."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from devlib import comfyui
from devlib.common import clean_env
from tiny.models import network, tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import measure  # noqa: E402
import parts  # noqa: E402
import scaling  # noqa: E402
import subjects  # noqa: E402

pytestmark = pytest.mark.slow

NAMES = ("step", "run", "scaling", "memory", "startup", "decode", "multigpu")  # the last keeps to one core
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
D, FFN, N, M, L, TEXT, BLOCKS = 256, 512, 108, 16, 512, 64, 2  # `subjects.QUICK`; the audio MLP is 768 wide

# Runs every benchmark as a script, in one process: most of the time of each is importing torch and ComfyUI.
DRIVER = """
import contextlib, io, json, runpy, sys
folder, out, *names = sys.argv[1:]
sys.path[0] = folder
texts = {}
for name in names:
    plot = ["--plot", f"{out}/scaling.png"] if name == "scaling" and PLOT else []
    for options in (["--help"], ["--quick", "--runs", "2", "--json", f"{out}/{name}.json", *plot]):
        sys.argv = [name, *options]
        text = io.StringIO()
        try:
            with contextlib.redirect_stdout(text):
                runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
        except SystemExit as end:
            assert not end.code, (name, options, end.code)
        texts.setdefault(name, []).append(text.getvalue())
json.dump(texts, open(f"{out}/texts.json", "w"))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """What each benchmark wrote, by name, and under "texts" its help and its printed tables."""
    out = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-c", DRIVER.replace("PLOT", str(HAS_MATPLOTLIB)), str(BENCHMARKS), str(out), *NAMES]
    env = clean_env(COMFYUI_PATH=str(comfyui.find().path), OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in (*NAMES, "texts")}
    return found | {"plot": out / "scaling.png"}


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_measures_and_where(results, name):
    result, (help_text, tables) = results[name], results["texts"][name]
    assert result["benchmark"] == name
    machine = result["machine"]
    assert {"date", "cpu", "cores", "threads", "load", "gpu", "torch", "comfyui"} <= set(machine)
    assert machine["torch"] == torch.__version__ and machine["cores"] == os.cpu_count() and machine["threads"] == 1
    doc = (BENCHMARKS / f"{name}.py").read_text().split('"""')[1]
    assert " ".join(doc.split()) in " ".join(help_text.split())
    assert "--json" in help_text and "--quick" in help_text
    assert machine["torch"] in tables and "|---|" in tables


# --- one step ---------------------------------------------------------------------------------------------------------


def by_hand() -> dict[tuple[str, str], int]:
    """FLOP of one step at the quick size: 2 M K N a product, 4 N M D an attention."""
    flop = {("embedding", "video"): 2 * N * 192 * D, ("head", "video"): 2 * N * 192 * D,
            ("embedding", "audio"): 2 * M * 7 * (20 * D + 3 * D * 768), ("head", "audio"): 2 * M * 20 * D}
    for tower, own, other in (("video", N, M), ("audio", M, N)):
        flop |= {
            ("text embedding", tower): 2 * L * (TEXT * D + D * D),
            ("text: keys, values", tower): BLOCKS * 4 * L * D * D,
            ("timestep", tower): 2 * (256 * D + D * D + 6 * D * D),
            ("self-attention: projections", tower): BLOCKS * 8 * own * D * D,
            ("attention kernel: to itself", tower): BLOCKS * 4 * own * own * D,
            ("cross-attention: shared q, o", tower): BLOCKS * 4 * own * D * D,
            ("attention kernel: to text", tower): BLOCKS * 4 * own * L * D,
            ("other stream: keys, values", tower): BLOCKS * 4 * other * D * D,
            ("attention kernel: to the other stream", tower): BLOCKS * 4 * own * other * D,
            ("feed-forward", tower): BLOCKS * 4 * own * D * FFN,
        }
    return flop


def test_the_parts_of_a_step_add_up(results):
    *rows, video, audio = results["step"]["parts"]
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.5)  # medians of few rounds need not add up
    assert all(row["seconds"] > 0 for row in rows)
    found = {(row["part"], row["tower"]): round(row["gflop"] * 1e9) for row in rows}
    assert {part: flop for part, flop in found.items() if flop} == by_hand()
    without_products = {"modulation, norms, residuals", "self-attention: norm, rotation",
                        "cross-attention: norm, rotation", "rotary tables"}
    assert {part for part, flop in found.items() if not flop} <= {
        (part, tower) for part in without_products for tower in ("video", "audio")} | {parts.REST}
    towers = {row["tower"]: row["gflop"] * 1e9 for row in (video, audio)}
    assert towers == pytest.approx({tower: sum(f for (_, t), f in by_hand().items() if t == tower) for tower in towers})


def test_the_step_has_the_flop_of_the_hand_computation(results):
    step = results["step"]
    assert step["flop"] == sum(by_hand().values())
    share, peak, seconds = step["peak_share"], step["peak_flop_per_second"], step["seconds"]
    assert 0 < share["min"] <= share["median"] <= share["max"]
    assert share["max"] <= step["flop"] / seconds["min"] / peak["min"] * (1 + 1e-6)
    assert share["min"] >= step["flop"] / seconds["max"] / peak["max"] * (1 - 1e-6)


def test_splitting_leaves_the_network_as_it_was():
    model = network(tiny_model())
    before = [dict(vars(module)) for module in model.modules()]
    inputs = [torch.zeros(1, 48, 2, 4, 4), torch.zeros(1, 20, 9)], torch.tensor([600.0]), torch.zeros(1, 6, 64)
    with torch.no_grad():
        split = parts.split_seconds(model, lambda options: model(*inputs, options), {"video": 8, "audio": 9})
    assert {what for what, _ in split} >= {"feed-forward", "text embedding", "attention kernel: to itself"}
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(ValueError, match="differ in length"):
        parts.Split(model, {"video": 8, "audio": 8}, int, int)


# --- the shared measures ----------------------------------------------------------------------------------------------


def test_rounds_alternate_and_ratios_are_taken_round_by_round():
    calls = []
    timings = measure.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=3, warmup=1)
    assert "".join(calls) in ("baabbaab", "abbaabba")
    assert [len(timings[name]) for name in "ab"] == [3, 3]
    timings = measure.Timings(a=[1.0, 2.0, 8.0], b=[2.0, 8.0, 8.0])
    assert timings.ratio("a", over="b") == measure.Spread(0.5, 0.25, 1.0)
    assert timings.seconds("a") == measure.Spread(2.0, 1.0, 8.0)


def test_attention_is_counted_whatever_kernel_computes_it():
    q, k = torch.randn(1, 5, 256), torch.randn(1, 7, 256)
    heads = [x.unflatten(-1, (2, 128)).transpose(1, 2) for x in (q, k, k)]
    flop = 4 * 5 * 7 * 256
    assert measure.count_flop(lambda: torch.nn.functional.scaled_dot_product_attention(*heads)) == flop
    with measure.FlopCounter() as counter:
        counter.attention(lambda q, *_: torch.empty_like(q), q, k, k, 2)  # a kernel that PyTorch knows nothing of
        counter.attention(lambda q, k, *_: q @ k.mT @ k, q, k, k, 1)
    assert counter.total == 2 * flop


def test_the_fit_finds_a_known_law():
    rows = [{"tokens": n, "cost": 3e9 + 2e6 * n + 50 * n * n} for n in (100, 900, 5000, 60000)]
    law = scaling.fit(rows, lambda row: row["cost"])
    assert (law["a"], law["b"], law["c"]) == pytest.approx((3e9, 2e6, 50), rel=1e-6)
    assert law["worst"] < 1e-9
    rows[1]["cost"] *= 1.3
    assert scaling.fit(rows, lambda row: row["cost"])["worst"] > 0.01


# --- scale, memory, whole runs, start ---------------------------------------------------------------------------------


def test_cost_follows_the_expected_law(results):
    """One block of the real width: 4 D FLOP for each pair of video tokens, nothing else quadratic, memory linear."""
    exact = results["scaling"]["exact"]
    for length in (5, 10):
        law = exact["fits"][f"FLOP, {length} s"]
        assert law["c"] == pytest.approx(4 * 3072, rel=1e-6) and law["worst"] < 1e-9
    assert abs(exact["fits"]["bytes"]["quadratic_share"]) < 0.01 and exact["fits"]["bytes"]["worst"] < 0.01
    assert [row["tokens"] for row in exact["clips"]] == [7936, 15004, 27900, 15616, 29524, 54900]
    one, two = exact["batches"]
    for cost in ("tflop", "peak_gib"):
        assert two[cost] == pytest.approx(2 * one[cost], rel=0.05)
    measured = results["scaling"]["measured"]
    assert len(measured["clips"]) == 6 and {row["batch"] for row in measured["batches"]} == set(scaling.BATCHES)
    assert all(row["time"]["min"] > 0 for row in measured["clips"])


def test_the_plot_is_a_small_picture(results):
    if not HAS_MATPLOTLIB:
        pytest.skip("matplotlib is not installed")
    content = results["plot"].read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 100_000


def test_memory_is_compared_with_the_estimate(results):
    memory = results["memory"]
    for row in memory["fake"]:
        assert row["estimate_gib"] / row["peak_gib"] == pytest.approx(row["ratio"]) and row["ratio"] > 1
    assert memory["real"]["counted_gib"] > 0
    if sys.platform == "linux":
        assert memory["real"]["ratio"]["min"] > 0


def test_a_whole_run_is_split_into_its_stages(results):
    run, overhead = results["run"]["run"], results["run"]["overhead"]
    assert [row["stage"] for row in run["stages"]] == [
        "load model", "load text encoder", "load video VAE", "load audio VAE", "encode prompt", "sample",
        "decode to mp4", "save"]
    for row in run["stages"]:
        assert 0 <= row["share"]["min"] <= row["share"]["median"] <= row["share"]["max"] < 1
    assert sum(row["share"]["min"] for row in run["stages"]) <= 1 <= sum(row["share"]["max"] for row in run["stages"])
    assert run["mp4_bytes"] > 1000
    assert 0 < overhead["outside_share"]["min"] <= overhead["outside_share"]["max"] < 1
    assert overhead["passes"] >= overhead["steps"] == 2


def test_the_start_names_the_modules_of_the_pack(results):
    start = results["startup"]["import"]
    assert start["ratio"]["median"] == pytest.approx(start["pack_s"]["median"] / start["comfyui_s"]["median"])
    assert {"ovi_model.ovi.model_base", "nodes.sampling"} <= {row["module"] for row in start["modules"]}
    assert {row["whose"] for row in start["modules"]} == {"the pack's"}


def test_subjects_are_the_sizes_of_the_issue():
    full, reduced = subjects.FULL.describe(), subjects.REDUCED.describe()
    assert (full["dim"], full["blocks"], full["ffn"], full["video_tokens"], full["audio_tokens"]) == (
        3072, 30, 14336, 15004, 157)
    assert (reduced["dim"], reduced["blocks"], reduced["video_tokens"], reduced["audio_tokens"]) == (1024, 4, 2048, 42)


def test_decode_compares_both_orders_for_every_decoder(results):
    rows = {row["decoder"]: row for row in results["decode"]["rows"]}
    assert set(rows) == {"taehv", "wan", *(f"device, {share} x x264" for share in ("0.5", "1", "2"))}
    for row in rows.values():
        assert row["seconds"]["median"] > 0 and row["ratio_1"]["median"] > 0 and row["ratio_2"]["median"] > 0
        assert all(0 <= row[f"idle_{ahead}"]["median"] < 1 for ahead in (0, 1, 2))
