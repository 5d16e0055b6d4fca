"""`benchmarks/approximations.py`: errors and scores are those of the latents and clips that a setting makes."""

import sys
from pathlib import Path

import comfy.utils
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from tiny_ovi.evaluate import Models, Way
from tiny_ovi.files import install

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from approximations import Row, Setting, compare, line

pytestmark = pytest.mark.slow
VIDEO, AUDIO = 0, 1
WAY = Way(steps=8)
TEXTS = ["A red ball bounces slowly on the left. Audio: a drum at every bounce.",
         "A blue ball bounces slowly on the right. Audio: a bell at every bounce."]


def without(stream: int):
    """A change of MODEL that leaves nothing of one stream."""
    def change(model):
        def emptied(executor, x, t, *args, **conds):
            streams = comfy.utils.unpack_latents(executor(x, t, *args, **conds), conds["latent_shapes"])
            streams[stream] = torch.zeros_like(streams[stream])
            return comfy.utils.pack_latents(streams)[0]

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "emptied", emptied)
        return model
    return change


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Row]:
    folder = tmp_path_factory.mktemp("approximations")
    install(folder / "models")
    settings = {"exact": Setting(WAY), "again": Setting(WAY), "half": Setting(Way(steps=4)),
                "silent": Setting(WAY, without(AUDIO)), "blank": Setting(WAY, without(VIDEO))}
    return dict(compare(Models(folder / "models"), settings, TEXTS, 2.0, folder / "clips"))


def score(row: Row, name: str) -> float:
    return row.scores[name][0]


def test_the_same_again_has_no_error_and_the_same_scores(rows):
    assert rows["again"] == rows["exact"]
    assert rows["exact"].passes == 1 and rows["exact"].video == rows["exact"].audio == [0, 0]
    assert score(rows["exact"], "ball's colour") == 1 and rows["exact"].scores["ball's colour"][1] == 0


def test_half_the_steps_are_half_the_passes_and_another_result(rows):
    assert rows["half"].passes == 0.5
    assert all(0.01 < error < 1 for error in rows["half"].video + rows["half"].audio)


def test_each_stream_has_its_own_error_and_its_own_scores(rows):
    silent, blank = rows["silent"], rows["blank"]
    assert silent.audio == pytest.approx([1, 1])
    assert score(silent, "timbre") == score(silent, "sync F1") == 0
    assert max(silent.video) < 1 and score(silent, "ball's colour") == 1
    assert min(blank.video) > max(silent.video) and max(blank.audio) < 1
    assert score(blank, "ball's colour") == score(blank, "sync F1") == 0


def test_the_table_shows_all_of_it():
    row = Row(0.5, [0.03, 0.04], [0.5, 0.5], {"place": (0.75, 0.25), "vowels seen": (0.875, 0.125)})
    assert line("a", row) == "| a | 0.50 | 0.035 | 0.500 |  |  | 0.75 (0.25) |  |  | 0.88 (0.12) |"
