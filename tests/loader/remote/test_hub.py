"""Adapters come from a hub: a server that answers as the Hugging Face Hub does."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ipc.errors import AdapterInvalid, AdapterNotFound, SidestreamError, Unavailable
from ipc.messages import AdapterId
from loader.remote.cache import ENTRY_NAME, AdapterCache
from loader.remote.fetch import Fetcher
from tests.loader.remote.file_server import FileServer, file_server

hub = pytest.importorskip("huggingface_hub", reason="no client of the Hub is installed")

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
CONFIG = b'{"peft_type": "LORA"}'
TENSORS = {"main": bytes(range(256)) * 5000, "v1": bytes(255 - n for n in range(256)) * 5000}


def described(tensors: bytes, commit: str, sha256: str | None = None) -> bytes:
    """What the Hub answers of a repository."""
    siblings = [
        {"rfilename": "adapter_config.json", "size": len(CONFIG), "blobId": "1" * 40},
        {
            "rfilename": "adapter_model.safetensors",
            "size": len(tensors),
            "blobId": "2" * 40,
            "lfs": {
                "sha256": sha256 or hashlib.sha256(tensors).hexdigest(),
                "size": len(tensors),
                "pointerSize": 130,
            },
        },
        {"rfilename": "training/optimizer.pt", "size": 1 << 40, "blobId": "3" * 40},
    ]
    answer = {"id": "team/adapter", "_id": "0", "sha": commit, "siblings": siblings}
    return json.dumps(answer).encode()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with file_server() as server:
        for revision, commit in COMMITS.items():
            tensors = TENSORS[revision]
            about = described(tensors, commit)
            query = "?blobs=true"
            for asked in (revision, commit):
                server.files[f"/api/models/team/adapter/revision/{asked}{query}"] = about
            base = f"/team/adapter/resolve/{commit}"
            server.files[f"{base}/adapter_config.json"] = CONFIG
            server.files[f"{base}/adapter_model.safetensors"] = tensors
        server.files[f"/api/models/team/adapter{query}"] = described(
            TENSORS["main"], COMMITS["main"]
        )
        point_at(server.url, monkeypatch)
        yield server


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def fetcher_of(folder: Path, **options: Any) -> Fetcher:
    cache = AdapterCache(folder / "cache", 1 << 30)
    return Fetcher(cache, ("hf://team/",), 60.0, sleep=lambda _: None, **options)


def fetched(folder: Path, path: str, number: int = 1) -> Path:
    return Path(fetcher_of(folder).fetch(AdapterId(number), path))


def test_a_repository_is_fetched_at_the_commit_of_its_default_branch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch) as server:
        got = fetched(folder, "hf://team/adapter")
        assert (got / "adapter_model.safetensors").read_bytes() == TENSORS["main"]
        record = json.loads((got / ENTRY_NAME).read_text())
        assert record["address"] == f"hf://team/adapter@{COMMITS['main']}"
        assert not any("optimizer" in path for _, path, _ in server.requests)


def test_a_tag_is_another_adapter_and_what_is_there_is_not_fetched_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch) as server:
        first = fetched(folder, "hf://team/adapter@v1")
        assert (first / "adapter_model.safetensors").read_bytes() == TENSORS["v1"]
        assert fetched(folder, f"hf://team/adapter@{COMMITS['v1']}", 2) == first
        assert len([1 for _, path, _ in server.requests if "safetensors" in path]) == 1


def test_a_file_of_another_hash_than_the_hub_says_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(monkeypatch) as server:
        about = described(TENSORS["main"], COMMITS["main"], sha256="0" * 64)
        server.files["/api/models/team/adapter?blobs=true"] = about
        with pytest.raises(AdapterInvalid, match="SHA-256"):
            fetched(folder, "hf://team/adapter")


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/team/adapter/resolve/{COMMITS['main']}/adapter_model.safetensors"
    with serving(monkeypatch) as server, file_server() as other:
        other.files["/blob"] = TENSORS["main"]
        server.answers[path] = (302, {"Location": f"{other.url}/blob"})
        # Only https is followed there; loopback stands in for it.
        monkeypatch.setattr(
            "loader.remote.origins._is_hubs_redirect", lambda url: url.startswith(other.url)
        )
        got = fetched(folder, "hf://team/adapter")
        assert (got / "adapter_model.safetensors").read_bytes() == TENSORS["main"]
        names = [{name.lower() for name in headers} for headers in other.seen_headers]
        assert names and not any("authorization" in each for each in names)
        assert any(
            headers.get("authorization", headers.get("Authorization")) == "Bearer hf_secret"
            for headers in server.seen_headers
        )


def test_the_hub_may_not_redirect_to_plain_http(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"/team/adapter/resolve/{COMMITS['main']}/adapter_model.safetensors"
    with serving(monkeypatch) as server:
        server.answers[path] = (302, {"Location": "http://169.254.169.254/blob"})
        with pytest.raises(AdapterInvalid, match="redirects to"):
            fetched(folder, "hf://team/adapter")


@pytest.mark.parametrize("path", ["hf://team/other", "hf://team/adapter@nothing"])
def test_what_is_not_there_is_not_found_and_no_secret_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    with serving(monkeypatch), pytest.raises(AdapterNotFound) as failed:
        fetched(folder, path)
    assert path in failed.value.message and "hf_secret" not in failed.value.message


def test_nobody_there_and_offline_are_clear_errors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(Unavailable, match="hf://team/adapter: no answer"):
        fetched(folder, "hf://team/adapter")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SidestreamError) as failed:
        fetched(folder, "hf://team/adapter")
    assert "hf://team/adapter" in failed.value.message
