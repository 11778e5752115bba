"""Addresses of adapters on other machines: what is one, and what it allows."""

import pytest

from ipc.errors import InvalidRequest
from ipc.remote_path import is_remote
from loader.remote.address import Address, is_allowed, parse_address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/name", Address("hf", "org/name", None, "")),
        ("hf://org/name@main/sub/x.gguf", Address("hf", "org/name", "main", "sub/x.gguf")),
        ("hf://org/name@refs%2Fpr%2F1", Address("hf", "org/name", "refs/pr/1", "")),
        ("s3://bucket/a/b/", Address("s3", "bucket", None, "a/b")),
        ("https://Host.example:8443/a", Address("https", "host.example:8443", None, "a")),
        ("http://127.0.0.1:80/x", Address("http", "127.0.0.1:80", None, "x")),
        ("http://[::1]:80/x", Address("http", "[::1]:80", None, "x")),
    ],
)
def test_an_address_is_read_and_written(text: str, expected: Address) -> None:
    address = parse_address(text)
    assert address == expected
    assert parse_address(str(address)) == address
    assert is_remote(text) and not is_remote("/adapters/x")


@pytest.mark.parametrize(
    "text",
    [
        "ftp://host/x",
        "file:///etc/passwd",
        "http://example.com/x",
        "http://169.254.169.254/latest/meta-data",
        "https://user:secret@host/x",
        "https://host/a/../b",
        "https://host/a/%2e%2e/b",
        "https://host/a?sig=1",
        "https://host/a#b",
        "https://host\\@other/a",
        "https:///x",
        "https://host:0/x",
        "https://host:99999/x",
        "https://host/a\nb",
        "hf://name",
        "hf://org/na me",
        "hf://org/name@../x",
        "hf://org/name@",
        "hf://../name",
        "s3://B_/x",
        "s3://b",
        "https://host/" + "a" * 3000,
    ],
)
def test_what_is_no_address_of_ours_is_refused_with_its_field(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_address(text)
    assert refused.value.param == "path"
    assert "expected" in refused.value.message


@pytest.mark.parametrize(
    ("text", "prefix", "expected"),
    [
        ("https://host/team/x", "https://host/team", True),
        ("https://host/team", "https://host/team", True),
        ("https://host/teams/x", "https://host/team", False),
        ("https://host.evil/team/x", "https://host", False),
        ("https://host:444/team/x", "https://host", False),
        ("hf://org/name@abc", "hf://org/name", True),
        ("hf://org/name@abc/x.gguf", "hf://org/name", True),
        ("hf://org/names", "hf://org/name", False),
        ("hf://org/name", "hf://org/", True),
        ("hf://organ/name", "hf://org/", False),
        ("hf://org/name", "hf://org/name@abc", False),
        ("s3://bucket/a/x", "s3://", True),
        ("https://host/x", "s3://", False),
    ],
)
def test_only_what_lies_below_a_prefix_is_allowed(text: str, prefix: str, expected: bool) -> None:
    assert is_allowed(parse_address(text), [prefix]) is expected
    assert not is_allowed(parse_address(text), [])
