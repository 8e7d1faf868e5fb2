"""Every example config parses, builds on the meta device, and can be estimated."""

from pathlib import Path

import pytest
import torch

from megacogvx.config import load_config, read_yaml
from megacogvx.models.transformer import CogVideoXTransformer, transformer_core
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.testing.tiny_dataset import tiny_encoder, write_tiny_dataset
from megacogvx.training.config import TrainConfig
from megacogvx.training.estimate.machine import machine
from megacogvx.training.estimate.prediction import frozen_parameters, predict
from megacogvx.training.estimate.workload import workload

CONFIGS = Path(__file__).resolve().parents[4] / "examples" / "configs"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml") if "model" in read_yaml(path))
PAPER = {  # table 5: batch size, training steps; at most so many tokens in a pack
    1: (2000, 400_000, 25_000, (256, 384)),
    2: (1000, 220_000, 75_000, (480, 720)),
    3: (250, 120_000, 700_000, (768, 1360)),
    4: (100, 10_000, 700_000, (768, 1360)),
}


@pytest.fixture(scope="module")
def groups():
    yield initialize(ParallelConfig(device="cpu"))
    shutdown()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_parses_builds_and_is_estimated(name, groups):
    config = load_config(TrainConfig, CONFIGS / name)
    core = transformer_core(config.model, ParallelConfig(), groups, torch.bfloat16)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in CogVideoXTransformer(config.model, core, groups).parameters())
    gpus = config.parallel.replica_size
    clip = None if name != "demo.yaml" else (9, 64, 96)  # it says nothing of its clips' size
    found = predict(config, workload(config, clip), machine("h200-141"), gpus)
    assert found.step_seconds > 0 and 0 < found.mfu < 1
    assert not found.broken


@pytest.mark.parametrize("size", ["2b", "5b"])
@pytest.mark.parametrize("stage", PAPER)
def test_stages_are_the_papers(size, stage):
    config = load_config(TrainConfig, CONFIGS / f"cogvideox_{size}_stage{stage}.yaml")
    samples, steps, tokens, (height, width) = PAPER[stage]
    assert (config.data.samples_per_step, config.training.steps) == (samples, steps)
    assert tokens <= config.data.tokens_per_pack <= 1.02 * tokens
    assert config.data.tokens_per_pack % (16 * config.model.num_attention_heads) == 0
    assert (8 * config.model.sample_height, 8 * config.model.sample_width) == (height, width)
    assert config.model.preset == f"cogvideox_{size}"
    optimizer = config.optimizer.model_dump()
    table_6 = {"decay": "cosine", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1e-4, "clip_gradient": 1.0}
    assert {name: optimizer[name] for name in table_6} == table_6 and optimizer["min_learning_rate"] == 0.0
    assert config.training.precision == "bf16" and config.diffusion.snr_shift == (3.0 if size == "2b" else 1.0)
    start = Path(f"runs/cogvideox_{size}_stage{stage - 1}") if stage > 1 else None
    assert config.training.start_from == start


def test_samples_of_a_step_become_packs_by_the_mean_length():
    config = load_config(TrainConfig, CONFIGS / "cogvideox_5b_stage1.yaml")
    work = workload(config)
    assert work.tokens_per_sample == 13 * 16 * 24 + 226 and work.samples_per_pack == 4
    assert work.packs == round(2000 * 5218 / 25_344) and work.samples == 2000


@pytest.mark.parametrize(
    ("overrides", "billions"),
    [
        ([], 0.0),
        (["text.encoder=t5", "diffusion.dropped_text=empty"], 0.0),  # for one prompt, before the model is there
        (["text.encoder=t5"], 4.762),
    ],
)
def test_a_text_encoder_counts_only_while_it_is_kept(overrides, billions):
    config = load_config(TrainConfig, CONFIGS / "cogvideox_5b_stage1.yaml", overrides)
    assert frozen_parameters(config, workload(config)) == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["padded", "token_ids"])
def test_a_dataset_at_hand_says_whether_its_texts_are_token_ids(tmp_path, kind):
    write_tiny_dataset(tmp_path, 4, encoder=tiny_encoder(kind))
    config = load_config(
        TrainConfig, CONFIGS / "demo.yaml",
        [f"data.paths=[{tmp_path}]", "text.encoder=t5", "diffusion.dropped_text=empty", "data.packs_per_step=1"],
    )  # fmt: skip
    assert workload(config).token_ids == (kind == "token_ids")
