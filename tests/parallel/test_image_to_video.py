"""Image to video with token ids and averaged weights: the same losses on any layout, from one process's first step on.

Images and texts are encoded by frozen models on each rank that needs them, averages are shared among the data ranks.
"""

from __future__ import annotations

import pytest

from megacogvx.testing.spawn import on_ranks

BOUND = 2e-5  # relative, between layouts after a few optimizer steps


def _first_loss_of_one_process(groups, folder):
    """The first step's loss with all packs on this rank alone, from the untrained weights."""
    import torch

    from megacogvx.data.corpus import Corpus
    from megacogvx.data.loader import PackLoader
    from megacogvx.data.planner import PackPlan
    from megacogvx.diffusion.objective import sample_weights
    from megacogvx.diffusion.timesteps import step_timesteps
    from megacogvx.models.transformer.flops import cost_coefficients
    from megacogvx.models.transformer.initialize import initialize_weights
    from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
    from megacogvx.testing.one_process import alone
    from megacogvx.testing.tiny_run import config_of
    from megacogvx.training.setup import _batch_maker
    from megacogvx.training.step import TransformerStep

    config, solo = config_of(groups, folder, "none", 1), alone(groups)
    corpus = Corpus(config.data)
    plan = PackPlan(corpus.columns, config.data, 3, config.model.patch, cost_coefficients(config.model))
    core = transformer_core(config.model, config.parallel, solo, torch.float32)
    model = CogVideoXTransformer(config.model, core, solo).to(solo.device)
    initialize_weights(model, 3)
    with PackLoader(corpus, plan, with_images=True) as loader:
        packs = next(loader)
        weights = [sample_weights(layout, "sample") for layout in loader.layouts]
    diffusion = config.diffusion.model_copy(update={"scaling_factor": corpus.encoder.latent_scale_factor})
    maker = _batch_maker(config.model_copy(update={"diffusion": diffusion}), corpus, solo, torch.float32)
    timesteps, total, count = step_timesteps(config.diffusion, 3, 0, weights), 0.0, 0
    for pack in packs:
        output, loss = TransformerStep(maker)(iter([(pack, timesteps[pack.place])]), model)
        local, divisor, _ = loss(output)
        total, count = total + float(local), count + int(divisor)
    return total / count


@pytest.mark.slow
@on_ranks(2, {"tensor_parallel_size": 2})
def test_the_first_step_is_one_processs_and_a_restart_on_another_layout_goes_on(groups, folder):
    from megacogvx.testing.tiny_run import train_on

    first = _first_loss_of_one_process(groups, folder)
    _, groups = train_on(groups, folder, "run", 1, tensor_parallel_size=2)
    rows, _ = train_on(groups, folder, "run", 2, context_parallel_size=2)
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["loss"] == pytest.approx(first, rel=BOUND)
    assert rows[1]["validation_loss_ema"] != rows[1]["validation_loss"]
