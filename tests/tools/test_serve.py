"""From the command line of ``sidestream serve`` to the configurations of its processes."""

import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.config import ApiConfig
from engine.config import (
    AdapterLoading,
    DeviceKind,
    EngineConfig,
    LoadFormat,
    ModelDType,
    StartAdapter,
)
from ipc.errors import InvalidRequest, Unavailable
from loader.config import LoaderConfig
from tools.cli import make_parser
from tools.options.table import OPTIONS
from tools.serve import ServePlan, plan_server, reserve_port, server_spec
from tools.supervisor_config import LogLevel, SupervisorConfig

# What positional arguments set, and options that mean something to several processes.
COMPOSED = {
    EngineConfig: {
        *("trace", "model", "served_model_name", "adapters", "lora_dir"),
        "adapter_fetch_timeout_s",
    },
    SupervisorConfig: set[str](),
}


def plan(*arguments: str | Path) -> ServePlan:
    return plan_server(make_parser().parse_args(["serve", *map(str, arguments)]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for name in ("shout", "pirate"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    return tmp_path / "adapters"


def test_without_options_every_default_is_the_configurations_own(model: Path) -> None:
    made = plan(model)
    assert made.engine == EngineConfig(model=str(model), served_model_name="llama")
    assert made.loader == LoaderConfig(model=str(model))
    assert made.supervisor == SupervisorConfig()
    assert made.api == ApiConfig(
        model=str(model),
        served_model_name="llama",
        connect_timeout_s=SupervisorConfig().startup_timeout_s,
    )


GIVEN: list[tuple[str, str, Any]] = [
    ("--host", "0.0.0.0", "0.0.0.0"),
    ("--port", "0", 0),
    ("--chat-template", "/chat.jinja", "/chat.jinja"),
    ("--drain-timeout", "3", 3.0),
    ("--rpc-bind", "tcp://127.0.0.1:5557", "tcp://127.0.0.1:5557"),
    ("--rpc-key", "/engine.key_secret", "/engine.key_secret"),
    ("--rpc-client-keys", "/clients", "/clients"),
    ("--rpc-heartbeat-interval", "2.5", 2.5),
    ("--max-unread-tokens", "99", 99),
    ("--device", "cpu", DeviceKind.CPU),
    ("--dtype", "bfloat16", ModelDType.BFLOAT16),
    ("--load-format", "dummy", LoadFormat.DUMMY),
    ("--max-model-len", "1024", 1024),
    ("--seed", "7", 7),
    ("--max-num-seqs", "3", 3),
    ("--max-num-batched-tokens", "128", 128),
    ("--chunked-prefill-size", "96", 96),
    ("--max-waiting", "9", 9),
    ("--block-size", "8", 8),
    ("--kv-cache-memory", "1GB", 10**9),
    ("--gpu-memory-utilization", "0.5", 0.5),
    ("--no-prefix-caching", "", False),
    ("--enforce-eager", "", False),
    ("--max-adapter-memory", "3MiB", 3 << 20),
    ("--host-tier-memory", "5MiB", 5 << 20),
    ("--adapter-load-format", "dummy", LoadFormat.DUMMY),
    ("--max-lora-rank", "64", 64),
    ("--adapter-loading", "blocking", AdapterLoading.BLOCKING),
    ("--max-adapter-wait", "0.5", 0.5),
    ("--adapter-load-timeout", "11", 11.0),
    ("--no-adapter-cohorts", "", False),
    ("--no-adapter-rotation", "", False),
    ("--staging-chunks", "2", 2),
    ("--staging-chunk-size", "64KiB", 64 << 10),
    ("--read-threads", "97", 97),
    ("--read-block-size", "1MiB", 1 << 20),
    ("--row-scale-cache", "/rows", "/rows"),
    ("--row-scale-cache-size", "3GB", 3 * 10**9),
    ("--adapter-cache-dir", "/adapters", "/adapters"),
    ("--adapter-cache-size", "4GB", 4 * 10**9),
    ("--adapter-fetch-timeout", "13", 13.0),
    ("--catalog", "/catalog.json", "/catalog.json"),
    ("--log-level", "debug", LogLevel.DEBUG),
    ("--startup-timeout", "12", 12.0),
    ("--trace", "/tmp/trace.json", "/tmp/trace.json"),
]

# What some of them are refused without.
NEEDED = {
    "--adapter-load-format": ("--load-format", "dummy"),
    "--rpc-bind": ("--rpc-key", "/k", "--rpc-client-keys", "/c"),
}


@pytest.mark.parametrize(("flag", "text", "value"), GIVEN)
def test_an_option_sets_its_field(model: Path, flag: str, text: str, value: Any) -> None:
    made = plan(model, flag, *([text] if text else []), *NEEDED.get(flag, ()))
    (option,) = (option for group in OPTIONS.values() for option in group if option.flag == flag)
    configs = (made.engine, made.loader, made.api, made.supervisor)
    (config,) = (config for config in configs if isinstance(config, option.config))
    assert getattr(config, option.field) == value != option.default


def test_every_option_of_the_table_is_tried_above() -> None:
    flags = {option.flag for group in OPTIONS.values() for option in group}
    assert flags == {flag for flag, _, _ in GIVEN}


@pytest.mark.parametrize("config", [EngineConfig, SupervisorConfig])
def test_every_field_can_be_set_from_the_command_line(
    config: type[EngineConfig] | type[SupervisorConfig],
) -> None:
    settable = {o.field for group in OPTIONS.values() for o in group if o.config is config}
    fields = {field.name for field in msgspec.structs.fields(config)}
    assert fields == settable | COMPOSED[config]


def test_sources_on_other_machines_are_allowed_as_they_are_given(model: Path) -> None:
    made = plan(
        model,
        *("--lora", "far=hf://team/x@v1", "--adapter-source", "https://Host/team/"),
        *("--adapter-source", "hf://team", "--adapter-source", "s3://"),
        *("--adapter-fetch-timeout", "7"),
    )
    assert made.engine.adapters == (StartAdapter("far", "hf://team/x@v1"),)
    assert made.loader.adapter_addresses == ("hf://team/x@v1",)
    assert made.loader.adapter_sources == (
        "https://host/team",
        "hf://team/",
        "s3://",
    )
    assert made.loader.adapter_roots == ()
    assert made.engine.adapter_fetch_timeout_s == made.loader.adapter_fetch_timeout_s == 7.0


@pytest.mark.parametrize(
    "prefix", ["/adapters", "ftp://host/x", "http://example.com/x", "hf://a b"]
)
def test_a_prefix_that_no_source_has_is_refused(model: Path, prefix: str) -> None:
    with pytest.raises(InvalidRequest, match="expected"):
        plan(model, "--adapter-source", prefix)


def test_folders_of_adapters_are_made_absolute_and_allowed(
    model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapters)
    made = plan(
        model,
        "--lora",
        "a=shout",
        "--lora",
        "b=./pirate",
        "--pin",
        "b",
        "--adapter-root",
        "..",
    )
    shout, pirate = str(adapters / "shout"), str(adapters / "pirate")
    assert made.engine.adapters == (StartAdapter("a", shout), StartAdapter("b", pirate, True))
    assert made.loader.adapter_roots == (shout, pirate, str(adapters.parent))


def test_an_adapter_folder_is_told_to_engine_and_loader_and_its_adapters_can_be_pinned(
    model: Path, adapters: Path
) -> None:
    made = plan(model, "--lora-dir", adapters, "--pin", "shout")
    assert made.engine.lora_dir == made.loader.lora_dir == str(adapters)
    assert made.engine.adapters == (StartAdapter("shout", str(adapters / "shout"), True),)


def test_gguf_files_can_be_named_and_pinned_also_by_links(
    model: Path, adapters: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "of-gguf"
    folder.mkdir()
    (folder / "3f2a").write_bytes(b"")
    for name in ("a.gguf", "b.gguf"):
        (folder / name).symlink_to(folder / "3f2a")
    made = plan(model, "--lora", f"c={folder}/a.gguf", "--lora-dir", folder, "--pin", "b")
    assert made.engine.adapters == (
        StartAdapter("c", str(folder / "a.gguf")),
        StartAdapter("b", str(folder / "b.gguf"), True),
    )
    (folder / "b").mkdir()
    with pytest.raises(InvalidRequest, match=r"has b/ and b\.gguf: expected one"):
        plan(model, "--lora-dir", folder, "--pin", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/model"], "MODEL: expected a folder, but there is none at /no/model"),
        (["M", "--lora", "a=/no"], "--lora a: expected a folder, but there is none at /no"),
        (
            ["M", "--lora", "a=A/shout", "--lora", "a=A/pirate"],
            "--lora a: this name was given twice",
        ),
        (["M", "--lora", "llama=A/shout"], "--lora llama: the base model is called llama already"),
        (["M", "--pin", "x"], "--pin x: no adapter of --lora or --lora-dir has this name"),
        (["M", "--lora-dir", "/no"], "--lora-dir: expected a folder, but there is none at /no"),
        (
            ["M", "--adapter-root", "/no"],
            "--adapter-root: expected a folder, but there is none at /no",
        ),
        (
            ["M", "--adapter-load-format", "dummy"],
            "--adapter-load-format dummy: expected it only with --load-format dummy,"
            " got --load-format auto",
        ),
    ],
)
def test_arguments_that_do_not_fit_together_are_named(
    model: Path, adapters: Path, arguments: list[str], message: str
) -> None:
    placed = [argument.replace("=A/", f"={adapters}/") for argument in arguments]
    with pytest.raises(InvalidRequest) as caught:
        plan(*(model if argument == "M" else argument for argument in placed))
    assert str(caught.value) == message


def test_the_api_may_drain_before_it_is_killed(model: Path) -> None:
    spec = server_spec(plan(model, "--drain-timeout", "20", "--startup-timeout", "7"))
    assert spec.api.stop_timeout_s > 20
    assert spec.engine.start_timeout_s == spec.loader.start_timeout_s == 7


def test_the_loaders_products_take_no_threads_but_its_own(model: Path) -> None:
    spec = server_spec(plan(model))
    assert spec.loader.environment["OPENBLAS_NUM_THREADS"] == "1"
    assert spec.engine.environment == spec.api.environment == {}


def test_a_reserved_port_can_be_listened_at_again_and_again() -> None:
    with reserve_port("127.0.0.1", 0) as port:
        for _ in range(2):
            socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_somebody_listens_at_can_not_be_reserved() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with (
            pytest.raises(Unavailable, match=f"^can not listen at 127.0.0.1:{port}: Address"),
            reserve_port("127.0.0.1", port),
        ):
            pass
