"""megacogvx: pretraining of CogVideoX-class text-to-video models on megatron-core."""

__version__ = "0.1.0"
