from pathlib import Path

import pytest

from megacogvx.cli import main
from megacogvx.config import load_config
from megacogvx.testing.tiny_dataset import write_tiny_dataset
from megacogvx.training.config import TrainConfig
from megacogvx.training.estimate.workload import parse_clip, workload

CONFIGS = Path(__file__).resolve().parents[4] / "examples" / "configs"
TINY = {
    "model": ("preset=tiny", "out_channels=4", "in_channels=4", "text_embed_dim=8", "max_text_seq_length=6"),
}


def _printed(capsys, *arguments):
    status = main(["estimate", *map(str, arguments)])
    return status, " ".join(capsys.readouterr().out.split())


def test_a_published_stage_is_printed(capsys):
    status, text = _printed(capsys, CONFIGS / "cogvideox_5b_stage2.yaml", "--gpus", 256, "--clip", "49x480x720")
    assert status == 0
    for expected in (
        "parameters 5,570,283,072", "4.00 samples of 17,776 tokens", "236 packs", "tp2 cp4 pp1 dp32 selective on 256",
        "data.packs_per_step=236 doesn't divide over 32 data-parallel replicas; nearest that work: 224, 256",
        "memory of the fullest rank: fits", "data x context", "one step", "utilisation", "GPU-hours", "assumed",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_layout_that_is_too_large_says_so(capsys):
    recompute = "parallel.recompute=none"
    _, text = _printed(capsys, CONFIGS / "cogvideox_5b_stage3.yaml", recompute, "--gpus", 64, "--gpu", "h100-80")
    assert "does NOT fit" in text


def test_suggestions_fit_and_name_the_overrides(capsys):
    status, text = _printed(capsys, CONFIGS / "cogvideox_5b_stage1.yaml", "--gpus", 64, "--suggest")
    assert status == 0 and "layouts fit" in text
    assert "data.samples_per_step=null" in text and "data.packs_per_step=" in text


def test_no_suggestion_where_nothing_fits(capsys):
    _, text = _printed(capsys, CONFIGS / "cogvideox_5b_stage3.yaml", "--gpus", 2, "--suggest")
    assert "no layout fits" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 0), "--gpus=0 must be at least 1"),
        (("--gpus", 4), "a replica of this layout takes 8 GPUs"),
        (("--gpus", 8, "--clip", "49x480"), "FRAMESxHEIGHTxWIDTH"),
        (("--gpus", 8, "--clip", "48x480x720"), "the nearest that can: 45 x 480 x 720"),
        (("--gpus", 8, "--clip", "401x480x720"), "more than data.tokens_per_pack=75264"),
        (("--gpus", 8, "model.num_layer=3"), "did you mean model.num_layers?"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(["estimate", str(CONFIGS / "cogvideox_5b_stage2.yaml"), *map(str, arguments)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_datasets_own_packs_are_taken_where_it_is_at_hand(tmp_path):
    write_tiny_dataset(tmp_path / "data", samples=24)
    overrides = [f"model.{setting}" for setting in TINY["model"]]
    data = [f"data.paths=[{tmp_path / 'data'}]", "data.tokens_per_pack=64", "data.samples_per_step=10"]
    config = load_config(TrainConfig, None, [*overrides, *data])
    work = workload(config)
    assert work.source == "the packs of step 0 of the dataset" and len(work.layouts) == work.packs
    mean = work.packs * 64 / 10
    assert work.tokens_per_sample == pytest.approx(mean, rel=0.5)
    equal = workload(config, parse_clip("9x32x32"))
    assert len(equal.layouts) == 1 and equal.tokens_per_sample == 6 + 3 * 2 * 2
