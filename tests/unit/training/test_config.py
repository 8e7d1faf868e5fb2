"""Rules between sections: each message names the keys, the values and the sizes that would work."""

from pathlib import Path

import pytest
import torch

from megacogvx.config import build_config, load_config
from megacogvx.errors import ConfigError, LaunchError
from megacogvx.models.vae import CogVideoXVAE
from megacogvx.training.config import OptimizerConfig, TrainConfig
from megacogvx.training.vae_config import VAETrainConfig


def config(**sections) -> TrainConfig:
    values = {"model": {"preset": "tiny"}, "data": {"paths": ["d"], "tokens_per_pack": 1024, "packs_per_step": 4}}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return build_config(TrainConfig, values)


@pytest.mark.parametrize(("tensor", "context", "world"), [(1, 1, 1), (2, 1, 2), (2, 2, 4), (1, 4, 8), (2, 1, 8)])
def test_layouts_that_work(tensor, context, world):
    config(parallel={"tensor_parallel_size": tensor, "context_parallel_size": context}).validate_layout(world)


@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_heads_that_do_not_divide_name_the_products_that_work(axis):
    data = {"tokens_per_pack": 1023}
    with pytest.raises(ConfigError, match=rf"model\.num_attention_heads=4 .*{axis}_parallel_size=3.*work: 1, 2, 4"):
        config(parallel={f"{axis}_parallel_size": 3}, data=data).validate_layout(3)


def test_an_ablation_that_cannot_be_cut_over_tensor_ranks():
    with pytest.raises(ConfigError, match=r"model\.block=mmdit with parallel\.tensor_parallel_size=2.*works is 1"):
        config(model={"block": "mmdit"}, parallel={"tensor_parallel_size": 2}).validate_layout(2)
    config(model={"block": "mmdit"}, parallel={"context_parallel_size": 2}).validate_layout(2)


def test_pack_tokens_that_do_not_divide_name_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.tokens_per_pack=1022 .*size 4; nearest that work: 1020, 1024"):
        config(
            parallel={"tensor_parallel_size": 2, "context_parallel_size": 2}, data={"tokens_per_pack": 1022}
        ).validate_layout(4)


def test_packs_that_do_not_divide_over_the_replicas():
    with pytest.raises(
        ConfigError, match=r"data\.packs_per_step=4 .*3 data-parallel replicas; nearest that work: 3, 6"
    ):
        config().validate_layout(3)


def test_pipeline_stages_that_work():
    config(parallel={"pipeline_parallel_size": 2, "tensor_parallel_size": 2}).validate_layout(8)
    config(parallel={"pipeline_parallel_size": 3}, model={"num_layers": 5}).validate_layout(3)
    config(parallel={"pipeline_parallel_size": 3, "pipeline_layers": [2, 1, 1]}).validate_layout(3)


def test_more_stages_than_layers():
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=5 .*num_layers=4.*work: 1 to 4"):
        config(parallel={"pipeline_parallel_size": 5}, data={"packs_per_step": 8}).validate_layout(5)


@pytest.mark.parametrize("layers", [[2, 2, 1], [1, 2, 2], [4], [4, 0]])
def test_a_list_of_layers_that_does_not_add_up(layers):
    with pytest.raises(ConfigError, match=r"pipeline_layers=\[.*num_layers=4; for example \[2, 2\]"):
        config(parallel={"pipeline_parallel_size": 2, "pipeline_layers": layers}).validate_layout(2)


def test_fewer_packs_than_stages():
    with pytest.raises(ConfigError, match=r"packs_per_step=2 over 2 .*pipeline_parallel_size=2 .*work: 4 and more"):
        config(parallel={"pipeline_parallel_size": 2}, data={"packs_per_step": 2}).validate_layout(4)


def test_processes_that_do_not_hold_whole_pipelines():
    with pytest.raises(LaunchError, match=r"pipeline_parallel_size=3 = 3 processes.*start 3 or 6"):
        config(parallel={"pipeline_parallel_size": 3}).validate_layout(4)


def test_a_ring_takes_more_context_ranks_than_heads():
    config(parallel={"context_parallel_size": 8, "ring_size": 2}).validate_layout(8)
    with pytest.raises(ConfigError, match=r"num_attention_heads=4 .*=8 = 8; .*or parallel\.ring_size=2 for"):
        config(parallel={"context_parallel_size": 8}).validate_layout(8)


def test_kernels_that_are_not_there_are_broken_rules_like_others():
    parallel = {"transformer_impl": "transformer_engine", "fp8_recipe": "blockwise", "tensor_parallel_size": 3}
    with pytest.raises(ConfigError) as error:
        config(parallel=parallel, data={"tokens_per_pack": 999}).validate_layout(3)
    message = str(error.value)
    assert "transformer_impl=transformer_engine can't be used" in message
    assert "fp8_recipe=blockwise: data.tokens_per_pack=999 must divide into blocks of 32 on each of 3 ranks" in message
    assert "nearest that work: 960, 1056" in message and "num_attention_heads=4" in message


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_precision_names_a_dtype(precision, dtype):
    settings = config(training={"precision": precision}).training
    assert settings.dtype(torch.device("cpu")) == settings.dtype(torch.device("cuda")) == dtype


def test_all_broken_rules_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        config(parallel={"tensor_parallel_size": 3}).validate_layout(3)
    assert str(error.value).count("\n") == 1


def test_too_few_processes():
    with pytest.raises(LaunchError, match=r"tensor_parallel_size=4.*1 started"):
        config(parallel={"tensor_parallel_size": 4}).validate_layout(1)


def test_unknown_key_suggests_the_nearest(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {paths: [d], tokens_per_pack: 64}\nparallel: {tensor_paralel_size: 2}\n")
    with pytest.raises(
        ConfigError, match=r"parallel\.tensor_paralel_size; did you mean parallel\.tensor_parallel_size"
    ):
        load_config(TrainConfig, path)


STAGES = {"vae_stage1.yaml": 8, "vae_stage2.yaml": 64, "vae_tiny.yaml": 2, "vae_tiny_stage2.yaml": 4}


@pytest.mark.parametrize("name", STAGES)
def test_configs_of_the_stages_build(name, request):
    """On the meta device: every tensor of VAE and discriminator, for the clips that the config names."""
    loaded = load_config(VAETrainConfig, request.config.rootpath / "examples" / "configs" / name)
    loaded.validate_layout(STAGES[name])
    clips = loaded.clips
    loaded.vae.check_clip((1, 3, clips.frames, clips.height, clips.width))
    with torch.device("meta"):
        model, discriminator = CogVideoXVAE(loaded.vae), loaded.make_discriminator()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 215_583_907 or "tiny" in name
    assert loaded.has_gan and loaded.ema.decay > 0
    logits = discriminator(torch.empty(1, 3, clips.frames, clips.height, clips.width, device="meta"))
    assert logits.shape[2] == loaded.vae.latent_frames(clips.frames)


def test_stages_are_the_papers():
    """Section 2.1: 17 frames at 256 x 256 and 8 or 16 fps, images among them; then 161 frames, from these weights."""
    folder = Path(__file__).parents[3] / "examples" / "configs"
    first, second = (load_config(VAETrainConfig, folder / f"vae_stage{stage}.yaml") for stage in (1, 2))
    assert (first.clips.frames, first.clips.height, first.clips.width) == (17, 256, 256)
    assert first.clips.fps == (8, 16) and first.clips.image_share > 0 and first.loss.perceptual == "lpips"
    assert second.clips.frames == 161 and second.parallel.context_parallel_size > 1
    assert second.training.start_from == first.training.run_folder and second.vae == first.vae


@pytest.mark.parametrize("name", ["demo.yaml", "vae_demo.yaml", "progressive_tiny_i2v.yaml"])
def test_shipped_configs_are_valid(name, request):
    root = VAETrainConfig if name.startswith("vae") else TrainConfig
    loaded = load_config(root, request.config.rootpath / "examples" / "configs" / name)
    loaded.validate_layout(1)


def test_packs_are_asked_to_divide_once_they_are_known():
    given = config(data={"packs_per_step": 1, "samples_per_step": 10}, parallel={"pipeline_parallel_size": 2})
    given.validate_layout(6)
    known = given.model_copy(update={"data": given.data.in_packs(mean_tokens=512.0)})  # 5 packs
    with pytest.raises(ConfigError, match=r"data\.packs_per_step=5 .*3 data-parallel replicas"):
        known.validate_layout(6)
    with pytest.raises(ConfigError, match=r"nearest that work: 8$"):
        config(data={"packs_per_step": 5}).validate_layout(8)


def test_a_rate_that_would_rise_is_refused_with_the_config():
    with pytest.raises(ConfigError, match=r"min_learning_rate=0\.01 is above learning_rate=0\.0001"):
        build_config(OptimizerConfig, {"min_learning_rate": 0.01})


def test_steps_after_the_decay_need_a_rate():
    def broken(**optimizer):
        return config(optimizer=optimizer, training={"steps": 1000})

    with pytest.raises(ConfigError, match=r"optimizer\.decay_steps=100 .*steps 100 to 1000 .*rate 0; .*1000 or more"):
        broken(decay_steps=100).validate_layout(1)
    for works in ({"decay_steps": 1000}, {"decay_steps": 100, "min_learning_rate": 1e-6},
                  {"decay_steps": 100, "decay": "constant"}, {}):  # fmt: skip
        broken(**works).validate_layout(1)
    discriminator = {"discriminator_optimizer": {"decay_steps": 100}, "loss": {"gan_weight": 0.5, "gan_start_step": 50}}
    values = {"clips": {"height": 64, "width": 64}, "training": {"steps": 200}, **discriminator}
    with pytest.raises(ConfigError, match=r"discriminator_optimizer\.decay_steps=100 .*steps 100 to 150 "):
        build_config(VAETrainConfig, values).validate_layout(1)
