"""Checkpoints of other formats: SAT's, diffusers' and ours, from each to each, bit for bit.

Everything passes through our names and layout (`ours.py`), one tensor at a time:

    diffusers folder --\\                              /-- diffusers folder
    SAT .pt files    ---- table -> our names -> table ---- SAT .pt files
    our checkpoint   --/   (LoRA, dtype applied here)  \\-- our checkpoint

`diffusers.py`, `sat.py` and `megacogvx.py` know one format each, `convert.py` streams between them, `settings.py` holds
what else has to travel. Published parameter names are known in this room alone.
"""
