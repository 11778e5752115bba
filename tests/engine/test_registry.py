from pathlib import Path

import pytest

from engine.registry import IDS_PER_START, CatalogFile, Registry
from ipc.errors import AdapterConflict, AdapterNotFound, Internal, InvalidRequest
from tests.engine.builders import make_manifest


def _open(folder: Path) -> Registry:
    return Registry("base-model", CatalogFile(folder / "adapters.json"))


def _register(registry: Registry, name: str, path: str, *, persistent: bool = True) -> int:
    reservation = registry.reserve(name, path, persistent=persistent)
    registry.confirm(reservation, make_manifest(reservation.adapter_id), created_s=1)
    return reservation.adapter_id


def test_a_registration_survives_the_engine_and_is_inspected_anew(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    reservation = registry.reserve("shout", "/adapters/shout", pinned=True)
    registry.confirm(reservation, make_manifest(reservation.adapter_id), created_s=77)
    adapter = _open(tmp_path).get("shout")
    assert adapter.adapter_id == reservation.adapter_id
    assert (adapter.path, adapter.pinned, adapter.created_s) == ("/adapters/shout", True, 77)
    assert adapter.manifest is None


def test_an_inspected_manifest_is_attached_unless_the_adapter_is_gone(tmp_path: Path) -> None:
    _register(_open(tmp_path), "shout", "/a")
    registry = _open(tmp_path)
    old = registry.get("shout")
    manifest = make_manifest(old.adapter_id)
    attached = registry.attach(old, manifest)
    assert attached is not None and attached is registry.get("shout")
    assert attached.manifest is manifest
    registry.remove("shout")
    assert registry.attach(old, manifest) is None
    _register(registry, "shout", "/a")
    assert registry.attach(old, manifest) is None


def test_an_adapter_id_is_never_given_twice(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    ids = [_register(registry, "a", "/a"), _register(registry, "b", "/b", persistent=False)]
    registry.cancel(failed := registry.reserve("c", "/c"))
    registry.remove("a")
    ids += [failed.adapter_id, _register(registry, "a", "/a")]
    registry = _open(tmp_path)
    ids += [_register(registry, "d", "/d"), _register(registry, "e", "/e")]
    assert len(set(ids)) == len(ids)


def test_ids_go_on_when_those_of_a_start_are_spent(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    for _ in range(IDS_PER_START):
        registry.cancel(registry.reserve("a", "/a"))
    last = registry.reserve("a", "/a").adapter_id
    assert last == IDS_PER_START + 1
    assert _open(tmp_path).reserve("a", "/a").adapter_id > last


def test_a_failed_inspection_leaves_nothing(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    reservation = registry.reserve("shout", "/adapters/shout")
    registry.cancel(reservation)
    assert registry.adapters() == []
    assert _open(tmp_path).adapters() == []
    assert registry.reserve("shout", "/elsewhere").path == "/elsewhere"


def test_a_name_that_is_taken_is_refused_with_the_path_that_has_it(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    _register(registry, "shout", "/adapters/shout")
    for path in ("/elsewhere", "/adapters/shout"):
        with pytest.raises(AdapterConflict, match="'shout' exists already, from /adapters/shout"):
            registry.reserve("shout", path)
    registry.reserve("json", "/adapters/json")
    with pytest.raises(AdapterConflict, match="'json' is being registered from /adapters/json"):
        registry.reserve("json", "/elsewhere", replace=True)


def test_the_old_adapter_is_served_until_its_replacement_is_confirmed(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    old_id = _register(registry, "shout", "/old")
    reservation = registry.reserve("shout", "/new", replace=True)
    assert registry.get("shout").adapter_id == old_id
    manifest = make_manifest(reservation.adapter_id)
    adapter, replaced = registry.confirm(reservation, manifest, created_s=2)
    assert replaced is not None and replaced.adapter_id == old_id
    assert registry.get("shout") is adapter
    assert _open(tmp_path).get("shout").path == "/new"


def test_an_unknown_name_is_not_found(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    for ask in (registry.get, registry.remove):
        with pytest.raises(
            AdapterNotFound, match="no model or adapter is called 'nobody'"
        ) as error:
            ask("nobody")
        assert error.value.param == "model"
    assert registry.find("nobody") is None


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        ("a" * 256, "has 256 characters"),
        ("base-model", "is the base model's"),
        ("base:shout", "has a ':' or '/' in it"),
        ("../shout", "has a ':' or '/' in it"),
        ("sh\nout", "has a control character in it"),
    ],
)
def test_a_name_that_can_not_be_one_is_refused(name: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=f"{fault}: expected 1 to 255 characters"):
        _open(tmp_path).reserve(name, "/a")


def test_adapters_of_the_folder_are_not_in_the_catalog(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    _register(registry, "found", "/folder/found", persistent=False)
    _register(registry, "named", "/named")
    assert [adapter.name for adapter in registry.adapters()] == ["found", "named"]
    assert [adapter.name for adapter in _open(tmp_path).adapters()] == ["named"]


def test_a_pin_is_remembered(tmp_path: Path) -> None:
    registry = _open(tmp_path)
    _register(registry, "shout", "/a")
    registry.set_pinned("shout", True)
    assert _open(tmp_path).get("shout").pinned


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is damaged: Input data was truncated"),
        ('{"version": 1, "next_adapter_id": 1', "is damaged"),
        ('{"version": 1, "next_adapter_id": 1, "adapters": [], "x": 0}', "unknown field `x`"),
        ('{"version": 2, "next_adapter_id": 1, "adapters": []}', "expected version 1, got 2"),
        (
            '{"version": 1, "next_adapter_id": 1, "adapters": [{"adapter_id": 5, "name": "a",'
            ' "path": "/a", "pinned": false, "created_s": 0}]}',
            "next_adapter_id 1 is not above",
        ),
    ],
)
def test_a_damaged_catalog_is_named_and_left_alone(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "adapters.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=fault) as error:
        _open(tmp_path)
    assert str(path) in error.value.message
    assert path.read_text() == text


def test_a_change_that_can_not_be_saved_is_undone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    registry = _open(folder)
    _register(registry, "shout", "/a")
    (folder / "adapters.json").unlink()
    folder.rmdir()
    reservation = registry.reserve("json", "/json")
    with pytest.raises(Internal, match=r"adapters\.json can not be written: No such file"):
        registry.confirm(reservation, make_manifest(reservation.adapter_id), created_s=1)
    registry.cancel(reservation)
    with pytest.raises(Internal):
        registry.remove("shout")
    assert [adapter.name for adapter in registry.adapters()] == ["shout"]


def test_no_temporary_file_is_left_beside_the_catalog(tmp_path: Path) -> None:
    _register(_open(tmp_path), "shout", "/a")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters.json"]
