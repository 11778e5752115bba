"""Key files: what is written can be read, by nobody else, and is never written over."""

import stat
from pathlib import Path

import pytest

from ipc.curve import create_keys, read_key_pair, read_public_key
from ipc.errors import InvalidRequest


def test_a_new_pair_is_read_back_and_its_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    public, secret = create_keys(tmp_path / "engine")
    assert (public.name, secret.name) == ("engine.key", "engine.key_secret")
    pair = read_key_pair(secret)
    assert read_public_key(public) == read_public_key(secret) == pair.public
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert pair.secret not in public.read_bytes()
    assert pair.secret.decode() not in repr(pair)


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    public, secret = create_keys(tmp_path / "engine")
    before = secret.read_bytes()
    public.unlink()
    with pytest.raises(InvalidRequest, match="never overwritten"):
        create_keys(tmp_path / "engine")
    assert secret.read_bytes() == before and not public.exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere: No such file"):
        create_keys(tmp_path / "nowhere" / "engine")


def test_files_that_are_no_keys_are_refused_by_name(tmp_path: Path) -> None:
    public, _ = create_keys(tmp_path / "engine")
    with pytest.raises(InvalidRequest, match="expected a secret key"):
        read_key_pair(public)
    empty = tmp_path / "empty.key"
    empty.write_text("")
    short = tmp_path / "short.key"
    short.write_text('curve\n    public-key = "abc"\n')
    for path in (empty, short, tmp_path / "absent"):
        with pytest.raises(InvalidRequest, match=path.name):
            read_public_key(path)
