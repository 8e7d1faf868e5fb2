"""Reading from an S3 bucket, of moto's server in this process, and from a web server that serves ranges."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch

from megacogvx.data.indexed import IndexedDataset, remote
from megacogvx.data.indexed.side_columns import write_side_column
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import write_tiny_dataset


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path / "dataset", 12, shards=2)
    write_side_column(tmp_path / "dataset", "flow", np.arange(12.0), IndexedDataset(tmp_path / "dataset").sample_id)
    return tmp_path / "dataset"


@pytest.fixture
def bucket(folder, monkeypatch):
    """The URL of the dataset in a bucket; fsspec gets the server's address as a user's config file would tell it."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"endpoint_url": f"http://{host}:{port}", "key": "testing", "secret": "testing"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("bucket")
    for path in folder.rglob("*.*"):
        files.pipe_file(f"bucket/sets/dataset/{path.relative_to(folder)}", path.read_bytes())
    yield "s3://bucket/sets/dataset", files
    server.stop()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def assert_same(folder, url):
    local, far = IndexedDataset(folder), IndexedDataset(url)
    for number in range(12):
        for frames in (None, range(0, 1)):
            a, b = local.sample(number, frames), far.sample(number, frames)
            assert torch.equal(a.latents, b.latents) and torch.equal(a.text, b.text) and a.metadata == b.metadata
    return far


@pytest.mark.slow
def test_a_bucket_reads_as_the_folder_and_damage_there_is_named(folder, bucket):
    url, files = bucket
    dataset = assert_same(folder, url)
    assert np.array_equal(dataset.side_column("flow"), np.arange(12.0))
    place = int(dataset.shards[0].index.columns["record"][2]) + 64
    data = bytearray(files.cat_file("bucket/sets/dataset/shard-00000.bin"))
    data[place] ^= 1
    files.pipe_file("bucket/sets/dataset/shard-00000.bin", bytes(data))
    with pytest.raises(DataError, match=r"s3://bucket/sets/dataset/shard-00000\.bin: sample 1002 \(record 2\)"):
        dataset.sample(2)
    with pytest.raises(DataError, match="s3://bucket/sets/other is not a dataset"):
        IndexedDataset("s3://bucket/sets/other")


def test_a_web_server_with_ranges_and_failures(folder, monkeypatch):
    """Every seventh answer is 503, as a busy store gives; a retry gets through."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    requests: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            requests.append(self.headers.get("Range", ""))
            if len(requests) % 7 == 0:
                self.send_error(503)
            else:
                self.answer(body=True)

        def answer(self, body):
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = data[int(span[1]) : int(span[2]) + 1] if span else data
            self.send_response(206 if span else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            if span:
                self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(data)}")
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert_same(folder, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert len(requests) > 20 and any(requests)
