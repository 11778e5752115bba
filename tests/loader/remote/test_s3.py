"""Adapters come from a server that speaks S3."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc.errors import AdapterNotFound, SidestreamError, Unavailable
from ipc.messages import AdapterId
from loader.remote.address import parse_address
from loader.remote.cache import AdapterCache
from loader.remote.fetch import Fetcher
from loader.remote.origins import S3Origin

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CONFIG = b'{"peft_type": "LORA"}'
# More than one piece of a read.
TENSORS = bytes(range(256)) * 40_000


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The name of a bucket with an adapter, on a server of the test's own."""
    server_module = pytest.importorskip("moto.server", reason="no S3 server is installed")
    s3fs = pytest.importorskip("s3fs", reason="no S3 client is installed")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3 = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        s3.mkdir("adapters")
        s3.pipe_file("adapters/team/a/adapter_config.json", CONFIG)
        s3.pipe_file("adapters/team/a/adapter_model.safetensors", TENSORS)
        s3.pipe_file("adapters/team/b/only.gguf", b"GGUF" * 100)
        yield "adapters"
    server.stop()


def fetcher_of(folder: Path) -> Fetcher:
    return Fetcher(AdapterCache(folder / "cache", 1 << 30), ("s3://",), 60.0, sleep=lambda _: None)


def test_a_prefix_is_fetched_as_a_folder_and_only_once(folder: Path, bucket: str) -> None:
    first = Path(fetcher_of(folder).fetch(AdapterId(1), f"s3://{bucket}/team/a"))
    assert (first / "adapter_config.json").read_bytes() == CONFIG
    assert (first / "adapter_model.safetensors").read_bytes() == TENSORS
    assert fetcher_of(folder).fetch(AdapterId(2), f"s3://{bucket}/team/a") == str(first)


def test_a_folder_with_one_gguf_file_is_that_adapter(folder: Path, bucket: str) -> None:
    got = Path(fetcher_of(folder).fetch(AdapterId(1), f"s3://{bucket}/team/b"))
    assert (got / "only.gguf").read_bytes() == b"GGUF" * 100


@pytest.mark.parametrize("path", ["team/c", "team/a/x.gguf", ""])
def test_what_is_not_there_is_not_found(folder: Path, bucket: str, path: str) -> None:
    with pytest.raises(AdapterNotFound):
        fetcher_of(folder).fetch(AdapterId(1), f"s3://{bucket}/{path}")


def test_a_bucket_that_is_not_there_is_told(folder: Path, bucket: str) -> None:
    with pytest.raises(SidestreamError) as failed:
        fetcher_of(folder).fetch(AdapterId(1), "s3://no-such-bucket/a")
    assert "s3://no-such-bucket/a" in failed.value.message


def test_reads_go_on_from_the_middle(bucket: str) -> None:
    origin = S3Origin(parse_address(f"s3://{bucket}/team/a"))
    file = origin.find("adapter_model.safetensors")
    assert file is not None and file.num_bytes == len(TENSORS) and file.tag
    assert b"".join(origin.read(file, 1_000_001)) == TENSORS[1_000_001:]
    assert origin.names() == ["adapter_config.json", "adapter_model.safetensors"]


def test_nobody_there_is_a_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="no S3 client is installed")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Unavailable) as failed:
        fetcher_of(folder).fetch(AdapterId(1), "s3://adapters/a")
    assert "s3://adapters/a" in failed.value.message
    assert "secret-key" not in failed.value.message
