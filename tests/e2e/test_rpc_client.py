"""The Python client beside the HTTP frontend: one engine, the same answers."""

import shutil
import socket
import time
from pathlib import Path

import pytest

from api.client import SidestreamClient
from ipc.curve import create_keys
from ipc.errors import AdapterNotFound, DeadlineExceeded, Unauthenticated, Unavailable
from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import DEADLINE_S, Server, serving, wait_until
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e


def run_folder(server: Server) -> Path:
    (folder,) = Path(server.run_parent.name).iterdir()
    return folder


def test_every_adapter_answers_as_over_http_and_ends_in_time(
    server: Server, tiny_model: TinyModel
) -> None:
    prompt = tiny_model.prompts[0]
    with SidestreamClient(run_folder(server), model=tiny_model.base) as client:
        for adapter in (None, *tiny_model.adapters):
            answer = client.generate(prompt, adapter=adapter, temperature=0, max_tokens=64)
            assert answer.text == server.answer(adapter or "tiny", prompt)
            pieces = client.stream(prompt, adapter=adapter, temperature=0, max_tokens=64)
            assert "".join(piece.text for piece in pieces) == answer.text
        with pytest.raises(AdapterNotFound):
            client.generate(prompt, adapter="nobody")
        with pytest.raises(DeadlineExceeded):
            client.generate(prompt, max_tokens=4000, ignore_eos=True, timeout_s=0.05)
        wait_until(lambda: client.stats().num_running == 0, "the engine is idle", 10)


def test_over_tcp_with_a_key_and_over_an_engines_death(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    public, secret = create_keys(tmp_path / "client")
    server_public, server_secret = create_keys(tmp_path / "server")
    (tmp_path / "clients").mkdir()
    shutil.copy(public, tmp_path / "clients")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    arguments = [*serve_arguments(tiny_model), "--rpc-bind", endpoint]
    arguments += ["--rpc-key", str(server_secret), "--rpc-client-keys", str(tmp_path / "clients")]
    with serving(*arguments) as server:
        with pytest.raises(Unauthenticated):
            SidestreamClient(endpoint, key=server_secret, server_key=server_public)
        with SidestreamClient(
            endpoint, model=tiny_model.base, key=secret, server_key=server_public
        ) as client:
            prompt, adapter = tiny_model.prompts[0], next(iter(tiny_model.adapters))

            def answer() -> str:
                return client.generate(prompt, adapter=adapter, temperature=0, max_tokens=64).text

            before = answer()
            stream = client.stream(prompt, adapter=adapter, max_tokens=4000, ignore_eos=True)
            next(stream)
            server.kill("engine")
            with pytest.raises(Unavailable):
                for _ in stream:
                    pass
            end_s = time.monotonic() + DEADLINE_S
            while True:
                try:
                    assert answer() == before
                    break
                except Unavailable:
                    assert time.monotonic() < end_s, "the engine did not come back"
                    time.sleep(0.05)
            assert client.engine.engine_epoch == 2
