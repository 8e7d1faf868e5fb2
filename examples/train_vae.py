"""Train a 3D causal VAE on clips; the same as `megacogvx train-vae`, for launchers that want a file.

torchrun --nproc-per-node 4 examples/train_vae.py --config examples/configs/vae_tiny_stage2.yaml
"""

import sys

from megacogvx.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-vae", *sys.argv[1:]]))
