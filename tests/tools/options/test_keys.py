"""Keys on the command line and in the environment."""

from pathlib import Path

import msgspec
import pytest

from api.api_keys import key_digest
from ipc.errors import InvalidRequest
from tools.bench.http_exchange import Address
from tools.cli import make_parser
from tools.options.keys import client_key
from tools.serve import ServePlan, plan_server


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIDESTREAM_API_KEY", raising=False)
    monkeypatch.delenv("SIDESTREAM_ADMIN_KEY", raising=False)


def plan(folder: Path, *arguments: str) -> ServePlan:
    return plan_server(make_parser().parse_args(["serve", str(folder), *arguments]))


def test_keys_reach_the_frontend_as_digests_alone(tmp_path: Path) -> None:
    made = plan(tmp_path, "--api-key", "one", "--api-key", "two", "--admin-key", "three")
    assert made.api.api_key_digests == (key_digest("one"), key_digest("two"))
    assert made.api.admin_key_digests == (key_digest("three"),)
    written = msgspec.json.encode(made.api).decode() + repr(made)
    assert not any(f'"{key}"' in written or f"'{key}'" in written for key in ("one", "two"))


def test_the_environment_has_keys_where_no_option_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDESTREAM_API_KEY", " one  two ")
    monkeypatch.setenv("SIDESTREAM_ADMIN_KEY", "three")
    made = plan(tmp_path)
    assert made.api.api_key_digests == (key_digest("one"), key_digest("two"))
    assert made.api.admin_key_digests == (key_digest("three"),)
    assert plan(tmp_path, "--api-key", "four").api.api_key_digests == (key_digest("four"),)


@pytest.mark.parametrize("key", ["", "a b", "ä", "line\n"])
def test_what_could_not_pass_through_a_header_is_refused_unrepeated(
    tmp_path: Path, key: str
) -> None:
    with pytest.raises(InvalidRequest, match="--api-key: expected a key of printing") as refused:
        plan(tmp_path, "--api-key", key)
    assert not key or key.strip() not in refused.value.message


def test_clients_send_the_admin_key_before_the_api_key() -> None:
    assert client_key({}) is None
    assert client_key({"SIDESTREAM_API_KEY": "a b"}) == "a"
    both = {"SIDESTREAM_API_KEY": "a", "SIDESTREAM_ADMIN_KEY": "c"}
    assert client_key(both) == "c"
    with pytest.raises(InvalidRequest, match="SIDESTREAM_API_KEY"):
        client_key({"SIDESTREAM_API_KEY": "ä"})


def test_the_load_generator_sends_its_key_and_does_not_show_it() -> None:
    address = Address.parse("http://host", "secret")
    assert b"\r\nauthorization: Bearer secret\r\n" in address.request("GET", "/v1/models")
    assert b"authorization" not in Address.parse("http://host").request("GET", "/v1/models")
    assert "secret" not in repr(address)
