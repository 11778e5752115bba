"""What the ``sidestream`` command asks of a running server."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from tools.http_client import HttpClient


class ListedModel(msgspec.Struct, frozen=True):
    """One entry of ``/v1/models``; ``parent`` is None for the base model."""

    id: str
    root: str
    parent: str | None


class ModelList(msgspec.Struct, frozen=True):
    data: list[ListedModel]


class PrefetchedAdapter(msgspec.Struct, frozen=True):
    """One entry of the answer to a prefetch."""

    lora_name: str
    residency: str


class PrefetchedList(msgspec.Struct, frozen=True):
    data: list[PrefetchedAdapter]


@dataclass(frozen=True)
class GenerateOptions:
    """How a prompt is continued; the likeliest tokens by default, so that it can be repeated."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    chat: bool = False


def list_models(client: HttpClient) -> list[ListedModel]:
    """The base model, then every adapter."""
    return msgspec.json.decode(client.get("/v1/models"), type=ModelList).data


def list_adapters(client: HttpClient, console: Console) -> None:
    """Prints a table of the server's adapters. An adapter of a folder may never have been used."""
    loaded = _loaded_adapters(client)
    table = Table("adapter", "lies in", "rank", "pinned", box=None, pad_edge=False)
    table.add_column("path", overflow="fold")
    for model in list_models(client):
        if model.parent is not None:
            labels = loaded.get(model.id, {})
            pinned = "yes" if labels.get("pinned") == "true" else ""
            level = labels.get("level", "disk")
            table.add_row(model.id, level, labels.get("rank", ""), pinned, model.root)
    console.print(table)


def load_adapter(client: HttpClient, name: str, path: Path, pinned: bool, replace: bool) -> None:
    """Registers the adapter in the server's folder ``path``, or puts it in another's place."""
    body = {"lora_name": name, "lora_path": str(path), "load_inplace": replace, "pinned": pinned}
    client.post("/v1/load_lora_adapter", body)


def unload_adapter(client: HttpClient, name: str) -> None:
    """Makes the server forget an adapter."""
    client.post("/v1/unload_lora_adapter", {"lora_name": name})


def prefetch_adapters(client: HttpClient, names: list[str]) -> dict[str, str]:
    """Tells the server that these are likely to be asked for; where each of them lies now."""
    answer = client.post("/v1/prefetch_lora_adapters", {"lora_names": names})
    adapters = msgspec.json.decode(answer, type=PrefetchedList).data
    return {adapter.lora_name: adapter.residency for adapter in adapters}


def generate(
    client: HttpClient, model: str | None, prompt: str, options: GenerateOptions
) -> Iterator[str]:
    """The text that follows ``prompt``, in the pieces in which it comes. None: the base model."""
    body: dict[str, Any] = {
        "model": model if model is not None else list_models(client)[0].id,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": True,
    }
    if options.seed is not None:
        body["seed"] = options.seed
    if options.chat:
        body["messages"] = [{"role": "user", "content": prompt}]
        events = client.stream("/v1/chat/completions", body)
    else:
        events = client.stream("/v1/completions", body | {"prompt": prompt})
    for event in events:
        for choice in event["choices"]:
            text = choice["delta"].get("content") if options.chat else choice["text"]
            if text:
                yield text


def counter(client: HttpClient, name: str) -> int:
    """The sum of all samples called ``name`` in the server's metrics."""
    samples = _samples(client.get("/metrics").decode())
    return int(sum(value for sample, _, value in samples if sample == name))


def _loaded_adapters(client: HttpClient) -> dict[str, dict[str, str]]:
    """Labels of the adapters that lie in memory, by name."""
    samples = _samples(client.get("/metrics").decode())
    return {
        labels["adapter_name"]: labels
        for name, labels, _ in samples
        if name == "vllm:lora_adapter_loaded"
    }


def _samples(exposition: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value
