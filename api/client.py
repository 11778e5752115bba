"""The Python clients: text and adapters, straight from the engine, without HTTP.

They speak the service of ``ipc/RPC.md``, and make text on their own side with the frontend's code:

>>> from api.client import SidestreamClient
>>> with SidestreamClient(model=model_folder) as client:     # the server that runs here
...     status = client.load_adapter("shout", adapter_folder)
...     answer = client.generate("hello", adapter="shout", max_tokens=8, temperature=0)
...     for piece in client.stream("hello", max_tokens=8, timeout_s=30):
...         print(piece.text, end="", flush=True)

``AsyncSidestreamClient`` has the same methods as coroutines, for one event loop. Errors are those
of ``ipc.errors``; each has a ``code``, gRPC's.
"""

from api.async_client import AsyncSidestreamClient
from api.client_config import ClientConfig
from api.sync_client import SidestreamClient, TextStream
from api.text_stream import AsyncTextStream, TextAnswer, TextPiece

__all__ = [
    "AsyncSidestreamClient",
    "AsyncTextStream",
    "ClientConfig",
    "SidestreamClient",
    "TextAnswer",
    "TextPiece",
    "TextStream",
]
