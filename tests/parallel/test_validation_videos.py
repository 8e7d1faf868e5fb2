"""Videos of held-out texts are sampled by the first replica together, on the model that is being trained."""

from __future__ import annotations

import torch

from megacogvx import draws
from megacogvx.testing.spawn import on_ranks

SMALL = {
    "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 8, "time_embed_dim": 32,
    "max_text_seq_length": 6, "in_channels": 4, "out_channels": 4, "use_rotary_positional_embeddings": True,
}  # fmt: skip
EXPECTED: dict[str, torch.Tensor] = {}  # of the layout before


def _prepared(groups, folder):
    """Return a model with gradients, a data rank's packs, and the path of a VAE."""
    from megacogvx.checkpoint.directory import CheckpointDirectory
    from megacogvx.checkpoint.distributed import save
    from megacogvx.config import dump_config
    from megacogvx.data.config import DataConfig
    from megacogvx.data.corpus import Corpus
    from megacogvx.data.loader import PackLoader
    from megacogvx.data.planner import PackPlan
    from megacogvx.models.transformer.config import CogVideoXConfig
    from megacogvx.models.transformer.initialize import initialize_weights
    from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
    from megacogvx.models.vae.config import VAEConfig
    from megacogvx.models.vae.initialize import initialize_weights as initialize_vae
    from megacogvx.models.vae.model import CogVideoXVAE
    from megacogvx.parallel.config import ParallelConfig
    from megacogvx.parallel.groups import barrier
    from megacogvx.testing.tiny_dataset import write_tiny_dataset

    if groups.is_first:
        write_tiny_dataset(folder / "held_out", 4, sizes=((3, 4, 4), (3, 4, 6)))
    barrier(groups)
    data = DataConfig(paths=(str(folder / "held_out"),), tokens_per_pack=64, packs_per_step=2)
    corpus = Corpus(data)
    config = CogVideoXConfig(**SMALL)
    with PackLoader(corpus, PackPlan(corpus.columns, data, 0, config.patch, (1.0, 0.0)), *groups.data) as loader:
        packs = next(loader)
    vae_config = VAEConfig(preset="tiny", latent_channels=4)
    vae = CogVideoXVAE(vae_config)
    initialize_vae(vae, 1)
    save(
        CheckpointDirectory(folder / "vae" / "checkpoints"),
        1,
        vae,
        None,
        {"config": {"vae": dump_config(vae_config)}},
        groups,
    )
    parallel = ParallelConfig(tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1])
    model = CogVideoXTransformer(config, transformer_core(config, parallel, groups, torch.float32), groups)
    initialize_weights(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # modulation starts at zero, which would leave the texts unseen
                parameter += 0.1 * draws.normal((1,), 0, name).to(parameter)
    return model.train(), packs, folder / "vae"


@on_ranks(2, {"tensor_parallel_size": 2}, {"context_parallel_size": 2}, {})
def test_the_first_rank_gets_the_videos_whatever_the_layout(groups, folder):
    from megacogvx.diffusion.config import DiffusionConfig
    from megacogvx.diffusion.schedule import NoiseSchedule
    from megacogvx.inference.denoise import SamplingSettings
    from megacogvx.parallel.groups import barrier
    from megacogvx.training.validation_videos import ValidationVideos

    model, packs, vae = _prepared(groups, folder)
    videos = ValidationVideos(
        packs, 2, model, NoiseSchedule(DiffusionConfig()), 0.7, vae, SamplingSettings(2), folder / "validation", groups
    )
    made, again = videos.make(9), videos.make(19)
    assert model.training
    barrier(groups)
    if not groups.is_first:
        assert made == {}
        return
    assert made.keys() == {"video-0", "video-1"} == again.keys()
    for name, frames_THWC in made.items():
        assert frames_THWC.dtype == torch.uint8 and frames_THWC.shape[0] == 9 and frames_THWC.shape[3] == 3
        assert torch.equal(frames_THWC, again[name]), "the same question each time"
        difference = (EXPECTED.setdefault(name, frames_THWC).int() - frames_THWC.int()).abs().max()
        assert difference <= 1, f"{name} differs by {difference} between layouts"
    assert not torch.equal(made["video-0"], made["video-1"][..., : made["video-0"].shape[2], :])
    assert len(list((folder / "validation").glob("step-000000*-video-*.mp4"))) == 4
