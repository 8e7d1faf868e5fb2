"""The indexed binary dataset: shards of `.bin` and `.idx` under one `manifest.json`.

`layout.py` documents every byte; `writer.py` makes a shard (one process each), `manifest.py` publishes the finished
shards, `reader.py` maps them, `verify.py` reads everything once and lists what is wrong.
"""

from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.manifest import Manifest, finish_dataset, read_manifest
from megacogvx.data.indexed.reader import IndexedDataset
from megacogvx.data.indexed.record import Record
from megacogvx.data.indexed.writer import DatasetWriter

__all__ = ["DatasetWriter", "EncoderInfo", "IndexedDataset", "Manifest", "Record", "finish_dataset", "read_manifest"]
