"""How one model is spread over ranks: the only room that communicates.

One file per axis: `tensor_parallel`, `sequence_parallel`, `context_parallel`, `frame_parallel`, `pipeline_parallel` and
`data_parallel`.
`groups.py` makes the process groups once; everything else receives them. Without a GPU the same code runs on gloo
(`cpu.py`).
"""

import warnings

# megatron-core says this up to four times while it is imported. fused_adam.py takes the place of what is missing.
warnings.filterwarnings("ignore", message="(Transformer Engine and Apex are|Apex is) not installed")
# Its optimizer asks shards of weights for gradients that they may not have.
warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf", module="megatron.core")
# torch renames two collectives that megatron-core calls by their old names, in every release so far.
warnings.filterwarnings("ignore", message=".*torch.distributed.*_tensor` is deprecated", category=FutureWarning)
