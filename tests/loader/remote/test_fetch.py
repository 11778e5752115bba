"""Adapters come from an HTTP server into the cache: once, whole, and only what they need."""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipc.errors import (
    AdapterInvalid,
    AdapterNotFound,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SidestreamError,
    Unavailable,
)
from ipc.messages import AdapterId
from loader.remote.cache import ENTRY_NAME, AdapterCache
from loader.remote.fetch import Fetcher
from tests.loader.remote.file_server import FileServer, file_server

CONFIG = b'{"peft_type": "LORA"}'
TENSORS = bytes(range(256)) * 20_000
PEFT = {"/a/adapter_config.json": CONFIG, "/a/adapter_model.safetensors": TENSORS}


def fetcher_of(
    folder: Path, server: FileServer, max_bytes: int = 1 << 30, timeout_s: float = 60.0
) -> Fetcher:
    cache = AdapterCache(folder / "cache", max_bytes)
    return Fetcher(cache, (server.url,), timeout_s, sleep=lambda _: None)


def fetched(fetcher: Fetcher, server: FileServer, name: str, number: int = 1) -> Path:
    return Path(fetcher.fetch(AdapterId(number), f"{server.url}/{name}"))


def test_a_folder_is_fetched_whole_and_nothing_else_with_it(folder: Path) -> None:
    with file_server(files={**PEFT, "/a/README.md": b"x", "/a/optimizer.pt": b"y"}) as server:
        got = fetched(fetcher_of(folder, server), server, "a")
        assert {each.name for each in got.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            ENTRY_NAME,
        }
        assert (got / "adapter_model.safetensors").read_bytes() == TENSORS
        asked = {path for _, path, _ in server.requests}
        assert asked == set(PEFT)


def test_a_gguf_file_is_fetched_by_its_own_address(folder: Path) -> None:
    with file_server(files={"/b/x.gguf": b"GGUF" * 100}) as server:
        got = fetched(fetcher_of(folder, server), server, "b/x.gguf")
        assert got.name == "x.gguf" and got.read_bytes() == b"GGUF" * 100


def test_shards_are_those_that_the_index_names(folder: Path) -> None:
    names = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": {"x": names[0], "y": names[1], "z": names[0]}}).encode()
    files = {
        "/a/adapter_config.json": CONFIG,
        "/a/adapter_model.safetensors.index.json": index,
        f"/a/{names[0]}": b"one",
        f"/a/{names[1]}": b"two",
    }
    with file_server(files=files) as server:
        got = fetched(fetcher_of(folder, server), server, "a")
        assert [(got / name).read_bytes() for name in names] == [b"one", b"two"]


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "model.safetensors", ""])
def test_an_index_that_names_anything_else_is_refused(folder: Path, name: str) -> None:
    index = json.dumps({"weight_map": {"x": name}}).encode()
    files = {"/a/adapter_config.json": CONFIG, "/a/adapter_model.safetensors.index.json": index}
    with (
        file_server(files=files) as server,
        pytest.raises(AdapterInvalid, match=r"expected 1 to 64 files"),
    ):
        fetched(fetcher_of(folder, server), server, "a")


def test_what_was_fetched_once_is_not_fetched_again(folder: Path) -> None:
    with file_server(files=PEFT) as server:
        first = fetched(fetcher_of(folder, server), server, "a")
        # As a loader that was started anew.
        again = fetched(fetcher_of(folder, server), server, "a", 2)
        assert again == first
        assert len(server.gets("/a/adapter_model.safetensors")) == 1


def test_what_changed_at_its_source_is_fetched_beside_the_old_one(folder: Path) -> None:
    with file_server(files=dict(PEFT)) as server:
        fetcher = fetcher_of(folder, server)
        first = fetched(fetcher, server, "a")
        server.files["/a/adapter_model.safetensors"] = TENSORS[::-1]
        second = fetched(fetcher, server, "a", 2)
        assert (first / "adapter_model.safetensors").read_bytes() == TENSORS
        assert (second / "adapter_model.safetensors").read_bytes() == TENSORS[::-1]


@pytest.mark.parametrize("has_tags", [True, False])
@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_transfer_that_breaks_off_goes_on_where_it_stopped(
    folder: Path, knows_ranges: bool, has_tags: bool
) -> None:
    path = "/a/adapter_model.safetensors"
    cuts = {path: [1_000_000, 2_000_000]}
    with file_server(files=PEFT, cuts=cuts, knows_ranges=knows_ranges, has_tags=has_tags) as server:
        got = fetched(fetcher_of(folder, server), server, "a")
        assert (got / "adapter_model.safetensors").read_bytes() == TENSORS
        # Without a tag nothing says that the rest is of the same file.
        if knows_ranges and has_tags:
            assert server.gets(path) == ["", "bytes=1000000-", "bytes=3000000-"]


def test_the_next_loader_goes_on_with_what_an_earlier_one_began(folder: Path) -> None:
    path = "/a/adapter_model.safetensors"
    with file_server(files=PEFT, cuts={path: [700_000, *[0] * 5]}) as server:
        with pytest.raises(Unavailable):
            fetched(fetcher_of(folder, server), server, "a")
        fetched(fetcher_of(folder, server), server, "a", 2)
        assert server.gets(path)[-1] == "bytes=700000-"


def test_a_source_that_brings_nothing_is_given_up_with_a_clear_error(folder: Path) -> None:
    path = "/a/adapter_model.safetensors"
    with (
        file_server(files=PEFT, cuts={path: [0] * 50}) as server,
        pytest.raises(Unavailable) as failed,
    ):
        fetched(fetcher_of(folder, server), server, "a")
    assert path in failed.value.message or "adapter_model" in failed.value.message
    assert failed.value.retry_after_s
    assert len(server.gets(path)) == 5


@pytest.mark.parametrize("has_tags", [True, False])
def test_a_file_that_changes_while_it_comes_is_not_mixed(folder: Path, has_tags: bool) -> None:
    path = "/a/adapter_model.safetensors"
    cuts = {path: [500_000]}
    with file_server(files=dict(PEFT), cuts=cuts, has_tags=has_tags) as server:
        fetcher = fetcher_of(folder, server)
        served = dict(server.files)

        class Changing(dict[str, bytes]):
            gets = 0

            def get(self, key: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
                payload = served.get(key, default)
                if key == path:
                    self.gets += 1
                    # HEAD and the GET that is cut see the old one.
                    return payload if self.gets <= 2 else TENSORS[::-1]
                return payload

        server.files = Changing()
        if has_tags:
            with pytest.raises(Unavailable, match="changed while it was fetched"):
                fetched(fetcher, server, "a")
        got = fetched(fetcher, server, "a", 2)
        assert (got / "adapter_model.safetensors").read_bytes() == TENSORS[::-1]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((403, {}), AdapterNotFound, "403"),
        ((401, {}), AdapterNotFound, "401"),
        ((500, {}), Unavailable, "500"),
        ((418, {}), AdapterInvalid, "418"),
        ((302, {"Location": "http://127.0.0.2:1/x"}), AdapterInvalid, "redirects to"),
        ((302, {"Location": "http://169.254.169.254/x"}), AdapterInvalid, "redirects to"),
        ((302, {"Location": "file:///etc/passwd"}), AdapterInvalid, "redirects to"),
        ((302, {"Location": "http://[bad"}), AdapterInvalid, "which is no address"),
    ],
)
def test_what_a_source_answers_instead_is_told(
    folder: Path, answer: tuple[int, dict[str, str]], error: type[SidestreamError], words: str
) -> None:
    answers = {"/a/adapter_config.json": answer}
    with file_server(files=PEFT, answers=answers) as server:
        with pytest.raises(error) as failed:
            fetched(fetcher_of(folder, server), server, "a")
        assert words in failed.value.message and server.url in failed.value.message


def test_a_redirect_within_the_server_is_followed_and_a_loop_is_not(folder: Path) -> None:
    moved = {"/b/adapter_config.json": (302, {"Location": "/a/adapter_config.json"})}
    loop = {"/c/adapter_config.json": (302, {"Location": "/c/adapter_config.json"})}
    files = {**PEFT, "/b/adapter_model.safetensors": TENSORS}
    with file_server(files=files, answers=moved | loop) as server:
        got = fetched(fetcher_of(folder, server), server, "b")
        assert (got / "adapter_config.json").read_bytes() == CONFIG
        with pytest.raises(AdapterInvalid, match="redirects more than"):
            fetched(fetcher_of(folder, server), server, "c", 2)


def test_nobody_there_is_a_clear_error(folder: Path) -> None:
    with file_server() as server:
        fetcher = fetcher_of(folder, server)
    with pytest.raises(Unavailable) as failed:
        fetched(fetcher, server, "a")
    assert server.url in failed.value.message and "no answer" in failed.value.message


def test_nothing_at_the_address_is_not_found(folder: Path) -> None:
    with file_server() as server:
        fetcher = fetcher_of(folder, server)
        for name in ("a", "a/x.gguf"):
            with pytest.raises(AdapterNotFound):
                fetched(fetcher, server, name)


def test_what_is_not_allowed_is_not_even_asked_for(folder: Path) -> None:
    with file_server(files=PEFT) as server:
        cache = AdapterCache(folder / "cache", 1 << 30)
        fetcher = Fetcher(cache, (f"{server.url}/other",), 60.0)
        with pytest.raises(InvalidRequest, match="--adapter-source"):
            fetched(fetcher, server, "a")
        assert server.requests == []


def test_a_compressed_answer_is_refused(folder: Path) -> None:
    headers = {"/a/adapter_config.json": {"Content-Encoding": "gzip"}}
    with (
        file_server(files=PEFT, headers=headers) as server,
        pytest.raises(AdapterInvalid, match="no Content-Encoding"),
    ):
        fetched(fetcher_of(folder, server), server, "a")


def test_a_configuration_of_gigabytes_is_refused_unread(folder: Path) -> None:
    headers = {"/a/adapter_config.json": {"Content-Length": str(8 << 30)}}
    with file_server(files=PEFT, headers=headers) as server:
        with pytest.raises(AdapterInvalid, match="expected at most"):
            fetched(fetcher_of(folder, server), server, "a")
        assert server.gets("/a/adapter_config.json") == []


def test_more_than_the_cache_is_refused_unread(folder: Path) -> None:
    with file_server(files=PEFT) as server:
        with pytest.raises(AdapterInvalid, match="--adapter-cache-size"):
            fetched(fetcher_of(folder, server, max_bytes=1000), server, "a")
        assert server.gets("/a/adapter_model.safetensors") == []


def test_a_fetch_that_takes_too_long_ends_and_keeps_what_came(folder: Path) -> None:
    with file_server(files=PEFT) as server:
        clock = iter(range(1_000_000))
        cache = AdapterCache(folder / "cache", 1 << 30)
        late = Fetcher(cache, (server.url,), 3.0, now_s=lambda: float(next(clock)))
        with pytest.raises(DeadlineExceeded, match="--adapter-fetch-timeout 3 s"):
            fetched(late, server, "a")
        fetched(fetcher_of(folder, server), server, "a", 2)
        assert server.gets("/a/adapter_model.safetensors")[-1].startswith("bytes=")


def test_two_who_want_the_same_share_one_transfer(folder: Path) -> None:
    with file_server(files=PEFT) as server:
        fetcher = fetcher_of(folder, server)
        barrier = threading.Barrier(4)

        def one(number: int) -> Path:
            barrier.wait(10)
            return fetched(fetcher, server, "a", number)

        with ThreadPoolExecutor(4) as pool:
            got = set(pool.map(one, range(1, 5)))
        assert len(got) == 1
        assert len(server.gets("/a/adapter_model.safetensors")) == 1


def files_of(*names: str) -> dict[str, bytes]:
    found = {}
    for name in names:
        found[f"/{name}/adapter_config.json"] = CONFIG
        found[f"/{name}/adapter_model.safetensors"] = hashlib.sha256(name.encode()).digest() * 1000
    return found


def test_the_longest_unused_makes_room_and_the_registered_do_not(folder: Path) -> None:
    with file_server(files=files_of("a", "b", "c", "d")) as server:
        fetcher = fetcher_of(folder, server, max_bytes=100_000)
        places = {}
        for number, name in enumerate("abc", 1):
            places[name] = fetched(fetcher, server, name, number)
        with pytest.raises(Overloaded, match="--adapter-cache-size"):
            fetched(fetcher, server, "d", 4)
        fetcher.let_go(AdapterId(2))
        fetched(fetcher, server, "d", 4)
        assert [places[name].exists() for name in "abc"] == [True, False, True]


def test_who_was_let_go_while_it_was_fetched_holds_nothing(folder: Path) -> None:
    with file_server(files=files_of("a", "b")) as server:
        fetcher = fetcher_of(folder, server, max_bytes=40_000)
        origin_opened = fetcher._open_at

        def let_go_first(address, allowed):  # type: ignore[no-untyped-def]
            fetcher.let_go(AdapterId(1))
            return origin_opened(address, allowed)

        fetcher._open_at = let_go_first
        first = fetched(fetcher, server, "a", 1)
        fetched(fetcher, server, "b", 2)
        assert not first.exists()


def test_what_an_earlier_loader_fetched_is_held_again_and_its_loss_is_told(folder: Path) -> None:
    with file_server(files=files_of("a", "b")) as server:
        earlier = fetcher_of(folder, server, max_bytes=40_000)
        first = fetched(earlier, server, "a")
        earlier.let_go(AdapterId(1))  # It ends.
        later = fetcher_of(folder, server, max_bytes=40_000)
        later.reopen(AdapterId(1), str(first))
        with pytest.raises(Overloaded):
            fetched(later, server, "b", 2)
        later.let_go(AdapterId(1))
        fetched(later, server, "b", 2)
        with pytest.raises(AdapterInvalid, match="load it again"):
            later.reopen(AdapterId(1), str(first))
        later.reopen(AdapterId(3), "/somewhere/else")


@pytest.mark.parametrize("damage", ["record", "file", "missing"])
def test_a_damaged_entry_is_fetched_anew(folder: Path, damage: str) -> None:
    with file_server(files=PEFT) as server:
        fetcher = fetcher_of(folder, server)
        first = fetched(fetcher, server, "a")
        fetcher.let_go(AdapterId(1))
        match damage:
            case "record":
                (first / ENTRY_NAME).write_text("{")
            case "file":
                (first / "adapter_config.json").write_bytes(CONFIG + b" ")
            case _:
                (first / "adapter_model.safetensors").unlink()
        again = fetched(fetcher, server, "a", 2)
        assert (again / "adapter_config.json").read_bytes() == CONFIG
        assert (again / "adapter_model.safetensors").read_bytes() == TENSORS


def test_two_fetches_at_once_keep_to_the_caches_size(folder: Path) -> None:
    with file_server(files=files_of("a", "b")) as server:
        fetcher = fetcher_of(folder, server, max_bytes=40_000)
        # The first has its room, and none of its bytes yet, when the second asks for its own.
        with fetcher._cache.partial("first") as first:
            fetcher._cache.make_room(32_000, first)
            with pytest.raises(Overloaded, match="--adapter-cache-size"):
                fetched(fetcher, server, "b")
        fetched(fetcher, server, "b")


def test_a_cache_behind_a_symbolic_link_is_held_again(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "cache").symlink_to(folder / "real")
    with file_server(files=files_of("a", "b")) as server:
        first = fetched(fetcher_of(folder, server), server, "a")
        later = fetcher_of(folder, server, max_bytes=40_000)
        later.reopen(AdapterId(1), str(first.resolve()))
        with pytest.raises(Overloaded):
            fetched(later, server, "b", 2)


def test_an_address_that_is_allowed_by_itself_allows_nothing_below_it(folder: Path) -> None:
    with file_server(files=PEFT) as server:
        cache = AdapterCache(folder / "cache", 1 << 30)
        fetcher = Fetcher(cache, (), 60.0, (f"{server.url}/a",))
        fetched(fetcher, server, "a")
        with pytest.raises(InvalidRequest, match="--adapter-source"):
            fetched(fetcher, server, "a/x.gguf", 2)
