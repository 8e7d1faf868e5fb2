"""What is kept: `distributed.py` saves and loads a run on any layout, `directory.py` keeps the folder whole.

A checkpoint `step-00000100/` holds megatron-core's files (tensors by name, each rank's share in files of its own),
`state.json` and what else the run puts there, and `manifest.json`, written last, with the size and checksum of every
other file (`manifest.py`). It is written as `step-00000100.partial/` and renamed when all of it is on disk.
"""

import megacogvx.parallel  # noqa: F401  it silences what megatron-core says on import, which comes next
