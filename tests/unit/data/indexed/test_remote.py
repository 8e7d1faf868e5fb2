"""A dataset at a URL reads as the same folder does.

fsspec's memory file system stands for the store; where s3fs, moto and aiohttp are installed, an S3 server and a web
server in this process do so as well.
"""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch

from megacogvx.data.config import DataConfig
from megacogvx.data.corpus import Corpus
from megacogvx.data.indexed import IndexedDataset, remote
from megacogvx.data.indexed.remote import RemotePath, folder_at
from megacogvx.data.indexed.side_columns import write_side_column
from megacogvx.data.indexed.verify import verify_dataset
from megacogvx.errors import DataError
from megacogvx.testing.tiny_dataset import write_tiny_dataset

URL = "memory://bucket/dataset"


@pytest.fixture
def folder(tmp_path):
    write_tiny_dataset(tmp_path / "dataset", 12, shards=2)
    ids = IndexedDataset(tmp_path / "dataset").sample_id
    write_side_column(tmp_path / "dataset", "flow", np.arange(12.0), ids)
    return tmp_path / "dataset"


@pytest.fixture
def store(folder, monkeypatch):
    """The same files in memory, and no waiting between attempts."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    files = fsspec.filesystem("memory")
    files.store.clear()
    for path in folder.rglob("*.*"):
        files.pipe_file(f"/bucket/dataset/{path.relative_to(folder)}", path.read_bytes())
    yield files
    files.store.clear()


@pytest.mark.parametrize("verify", ["always", "once", "never"])
def test_reads_what_the_folder_holds(folder, store, verify):
    local, far = IndexedDataset(folder), IndexedDataset(URL, verify)
    assert far.manifest == local.manifest and np.array_equal(far.side_column("flow"), np.arange(12.0))
    out = np.zeros(1 << 14, np.uint8)
    for number in range(12):
        for frames in (None, range(0, 1)):
            a, b = local.sample(number, frames), far.sample(number, frames)
            assert torch.equal(a.latents, b.latents) and torch.equal(a.text, b.text) and a.metadata == b.metadata
            end = far.read_into(number, out, frames)
            assert end and np.array_equal(out[: a.latents.numel() * 2], a.latents.view(torch.uint8).numpy().ravel())


def test_a_corpus_blends_folders_and_urls(folder, store):
    write_tiny_dataset(folder.parent / "other", 5, first_id=9000)
    config = DataConfig(paths=((1.0, str(folder.parent / "other")), (2.0, URL)), tokens_per_pack=100)
    corpus = Corpus(config)
    assert len(corpus) == 17 and corpus.sample(16).sample_id == 1011
    with pytest.raises(DataError, match="sample id 1000 occurs 2 times"):
        Corpus(DataConfig(paths=(str(folder), URL), tokens_per_pack=100))


def test_one_request_a_sample_and_only_for_the_frames_that_are_needed(folder, store, monkeypatch):
    """The last captions are no other sample's, so that their texts lie beside their latents."""
    asked, read, fetched, fetch = [], RemotePath.read_range, [], RemotePath.read_bytes
    monkeypatch.setattr(RemotePath, "read_bytes", lambda self: fetched.append(self.name) or fetch(self))
    monkeypatch.setattr(RemotePath, "read_range", lambda *args: asked.append(args[1:]) or read(*args))
    dataset = IndexedDataset(URL)
    whole_files = [name for name in fetched if name.endswith(".idx")]
    assert len(whole_files) == len(set(whole_files)) == 2 and not any(name.endswith(".bin") for name in fetched)
    asked.clear()
    record = dataset.sample(3)
    assert len(asked) == 1
    whole = record.latents.numel() * 2 + record.text.numel() * 2
    assert whole <= asked[0][1] - asked[0][0] <= whole + 256
    start = asked[0][0]
    monkeypatch.setattr("megacogvx.data.indexed.source.REMOTE_GAP", 0)
    asked.clear()
    dataset.sample(3, range(1, 2))
    frame_bytes = record.latents[0].numel() * 2
    assert sorted(asked)[0] == (start + frame_bytes, start + 2 * frame_bytes) and len(asked) > 1
    assert [name for name in fetched if name.endswith(".idx")] == whole_files


def test_a_flipped_bit_names_url_and_sample(store):
    dataset = IndexedDataset(URL)
    place = int(dataset.shards[0].index.columns["record"][2]) + 64
    data = bytearray(store.cat_file("/bucket/dataset/shard-00000.bin"))
    data[place] ^= 1
    store.pipe_file("/bucket/dataset/shard-00000.bin", bytes(data))
    with pytest.raises(DataError, match=r"memory://bucket/dataset/shard-00000\.bin: sample 1002 \(record 2\)"):
        dataset.sample(2)
    assert any("1002" in problem for problem in verify_dataset(URL).problems)


def test_a_file_cut_in_the_store_is_an_error_of_one_read(store):
    dataset = IndexedDataset(URL)
    whole = store.cat_file("/bucket/dataset/shard-00000.bin")
    store.pipe_file("/bucket/dataset/shard-00000.bin", whole[:600])
    with pytest.raises(
        DataError, match=r"sample \d+ \(record \d+\): .*shard-00000\.bin ends at byte \d+, \d+ are needed"
    ):
        dataset.sample(5)
    with pytest.raises(DataError, match="has 600 bytes, its index says"):
        IndexedDataset(URL)


@pytest.mark.parametrize("failures", [1, remote.ATTEMPTS])
def test_what_fails_is_tried_again_then_told(store, monkeypatch, failures):
    dataset, files = IndexedDataset(URL), type(store)
    ask, left = files.cat_file, [failures]

    def stumbling(self, *args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise ConnectionResetError("the server hung up")
        return ask(self, *args, **kwargs)

    monkeypatch.setattr(files, "cat_file", stumbling)
    if failures < remote.ATTEMPTS:
        assert dataset.sample(1).sample_id == 1001
    else:
        with pytest.raises(DataError, match=f"failed {remote.ATTEMPTS} times.*ConnectionResetError: the server hung"):
            dataset.sample(1)


def test_missing_datasets_and_protocols(store):
    with pytest.raises(DataError, match="memory://bucket/nothing is not a dataset"):
        IndexedDataset("memory://bucket/nothing")
    with pytest.raises(DataError, match="protocol nosuch:// can't be used"):
        IndexedDataset("nosuch://bucket/dataset")
    store.rm_file("/bucket/dataset/shard-00001.bin")
    with pytest.raises(DataError, match=r"shard-00001\.bin: size failed: FileNotFoundError"):
        IndexedDataset(URL)


def test_paths_stay_paths(tmp_path):
    assert folder_at(str(tmp_path)) == tmp_path and str(folder_at("s3://a/b/")) == "s3://a/b"
    shutil.rmtree(tmp_path)


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


def test_multi_storage_client_is_a_protocol_of_fsspec(folder, tmp_path, monkeypatch):
    """NVIDIA's client names stores by profiles of its own configuration: `msc://PROFILE/path`."""
    pytest.importorskip("multistorageclient")
    place = {"type": "file", "options": {"base_path": str(folder.parent)}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": {"far": {"storage_provider": place}}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    dataset = assert_same(folder, "msc://far/dataset")
    assert np.array_equal(dataset.side_column("flow"), np.arange(12.0))
    assert not verify_dataset("msc://far/dataset").problems
    with pytest.raises(DataError, match="msc://far/other is not a dataset"):
        IndexedDataset("msc://far/other")


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
