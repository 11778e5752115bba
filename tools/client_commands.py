"""What the ``sidestream`` command asks of a running server."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tools.http_client import HttpClient


class ListedModel(msgspec.Struct, frozen=True):
    """One entry of ``/v1/models``; ``parent`` is None for the base model."""

    id: str
    root: str
    parent: str | None


class ModelList(msgspec.Struct, frozen=True):
    data: list[ListedModel]


class ListedAdapter(msgspec.Struct, frozen=True):
    """One entry of ``/v1/adapters``; ``rank`` and ``bytes`` are None until it was looked at."""

    id: str
    path: str
    rank: int | None
    bytes: int | None
    residency: str
    pinned: bool
    num_requests_running: int
    num_requests_waiting: int


class AdapterList(msgspec.Struct, frozen=True):
    data: list[ListedAdapter]


class PrefetchedAdapter(msgspec.Struct, frozen=True):
    """One entry of the answer to a prefetch."""

    lora_name: str
    residency: str


class PrefetchedList(msgspec.Struct, frozen=True):
    data: list[PrefetchedAdapter]


class Message(msgspec.Struct, frozen=True):
    """One message of a chat; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class GenerateOptions:
    """How a prompt is continued; the likeliest tokens by default, so that it can be repeated.

    What is None is left to the server.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """Of a request's body, streaming."""
        chosen = {"top_p": self.top_p, "top_k": self.top_k, "seed": self.seed}
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            **{name: value for name, value in chosen.items() if value is not None},
            **({"stop": list(self.stop)} if self.stop else {}),
        }


def list_models(client: HttpClient) -> list[ListedModel]:
    """The base model, then every adapter."""
    return msgspec.json.decode(client.get("/v1/models"), type=ModelList).data


def base_model(client: HttpClient) -> str:
    """What requests call the base model."""
    return list_models(client)[0].id


def list_adapters(client: HttpClient) -> list[ListedAdapter]:
    """Every adapter. One of a folder may never have been used."""
    return msgspec.json.decode(client.get("/v1/adapters"), type=AdapterList).data


def load_adapter(client: HttpClient, name: str, path: str, pinned: bool, replace: bool) -> None:
    """Registers the adapter at ``path``, which the server reads, or puts it in another's place."""
    body = {"lora_name": name, "lora_path": path, "load_inplace": replace, "pinned": pinned}
    client.post("/v1/load_lora_adapter", body)


def unload_adapter(client: HttpClient, name: str) -> None:
    """Makes the server forget an adapter."""
    client.post("/v1/unload_lora_adapter", {"lora_name": name})


def prefetch_adapters(client: HttpClient, names: list[str]) -> list[PrefetchedAdapter]:
    """Tells the server that these are likely to be asked for; where each of them lies now."""
    answer = client.post("/v1/prefetch_lora_adapters", {"lora_names": names})
    return msgspec.json.decode(answer, type=PrefetchedList).data


def generate(
    client: HttpClient, model: str | None, prompt: str, options: GenerateOptions, *, chat: bool
) -> Iterator[str]:
    """The text that follows ``prompt``, in the pieces in which it comes. None: the base model."""
    asked = model if model is not None else base_model(client)
    if chat:
        yield from answer(client, asked, [Message("user", prompt)], options)
        return
    body = {"model": asked, "prompt": prompt, **options.fields()}
    for event in client.stream("/v1/completions", body):
        for choice in event["choices"]:
            if choice["text"]:
                yield choice["text"]


def answer(
    client: HttpClient, model: str, messages: Sequence[Message], options: GenerateOptions
) -> Iterator[str]:
    """The assistant's next message of a chat, in the pieces in which it comes."""
    body = {"model": model, "messages": list(messages), **options.fields()}
    for event in client.stream("/v1/chat/completions", body):
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text


def read_figures(client: HttpClient) -> "Figures":
    """The server's metrics of this moment."""
    return Figures(client.get("/metrics").decode())


class Figures:
    """What an exposition in Prometheus' text format says."""

    def __init__(self, exposition: str) -> None:
        self._samples = [
            sample
            for family in text_string_to_metric_families(exposition)
            for sample in family.samples
        ]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum of the samples of this name that have these labels; None: there are none."""
        values = [
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None

    def count(self, name: str, **labels: str) -> int:
        """As ``total``, in whole numbers, and 0 where there are none."""
        return int(self.total(name, **labels) or 0)
