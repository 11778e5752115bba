"""Every message that crosses a process.

Five conversations, each with one tagged union per direction:

| conversation    | there               | back               | socket                   |
|-----------------|---------------------|--------------------|--------------------------|
| client ↔ engine | ``ClientMessage``   | ``EngineMessage``  | ZMQ DEALER/ROUTER        |
| engine ↔ loader | ``EngineToLoader``  | ``LoaderToEngine`` | ZMQ ROUTER/DEALER        |
| handover        | ``HandoverMessage`` |                    | Unix SEQPACKET           |
| chunks          | ``ChunkReleased``   | ``ChunkReady``     | handover's, once granted |
| chat templates  | ``TemplateCall``    | ``TemplateAnswer`` | pipes of the api's child |

Adapter bytes never travel in a message: they lie in the staging ring, and a message says where.
The first conversation is for anybody's clients: ``ipc/RPC.md`` specifies it.
"""

from enum import Enum
from typing import Annotated, Any, NewType

import msgspec
from msgspec import Meta

from ipc.activity import StepThreadActivity
from ipc.base_model import BaseModel
from ipc.errors import ErrorInfo
from ipc.image import AdapterModule
from ipc.stats import AdapterHits, LoaderStats, LoadStats, StepStats

RequestId = NewType("RequestId", str)
CallId = NewType("CallId", int)
AdapterId = NewType("AdapterId", int)
"""One registration of one adapter; never used again, also not after a restart."""
LoadId = NewType("LoadId", int)
Epoch = NewType("Epoch", int)


# --- Client ↔ engine ---------------------------------------------------------------------------

PROTOCOL_VERSION = 1
"""Of this conversation; another one is refused."""

MAX_CLIENT_MESSAGE_BYTES = 16 << 20
"""What a client may send at once: room for a prompt of three million tokens."""

MAX_REQUEST_ID_CHARS = 256
MAX_SILENT_HEARTBEATS = 4
"""Intervals in a row without any message after which the other side counts as lost."""

MetadataKey = Annotated[str, Meta(pattern=r"^[0-9a-z_.-]{1,64}$")]
MetadataValue = Annotated[str, Meta(pattern=r"^[ -~]{0,1024}$")]
MAX_METADATA_ENTRIES = 32


class Call(
    msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True
):
    """What every call may say besides what it asks for, as in gRPC.

    A field that the engine does not know is refused: passed over, it might change the answer.
    ``deadline_ms`` is what is left of the client's patience when the call arrives; None waits for
    as long as it takes. ``metadata`` is for people: it is logged with whatever goes wrong.
    """

    deadline_ms: Annotated[int, Meta(ge=0, le=1 << 40)] | None = None
    metadata: Annotated[
        dict[MetadataKey, MetadataValue], Meta(max_length=MAX_METADATA_ENTRIES)
    ] = {}


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a request's tokens are chosen.

    ``max_tokens`` None means as many as the model's length allows; ``temperature`` 0 is greedy;
    ``top_k`` 0 and ``top_p`` 1 switch these filters off. ``seed`` makes the tokens a function of
    the prompt and the seed alone, whatever else runs in the batch. ``logprobs`` is the number of
    alternatives to report beside the chosen token, None for no logprobs at all.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


class FinishReason(Enum):
    """Why a request has no more tokens. A stop *string* is the text side's affair."""

    STOP = "stop"
    LENGTH = "length"


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms, of the model's own distribution before temperature and filters.

    ``top`` holds ``(token_id, logprob)`` in falling order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Connect(Call, frozen=True, tag="connect"):
    """The first message of a client; answered with ``Welcome``."""

    call_id: CallId
    protocol_version: int = PROTOCOL_VERSION


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """The client is there; answered with ``Pong`` at once, whatever the step thread does."""


NumCredits = Annotated[int, Meta(ge=1, le=1 << 30)]


class Generate(Call, frozen=True, tag="generate"):
    """Ask for tokens. ``adapter`` None is the base model. Answered by ``TokenDelta`` s.

    Each delta but one with an error takes one of the stream's ``credits``, and what has none is
    held back and joined into one; None lets every delta come at once.
    """

    request_id: Annotated[RequestId, Meta(min_length=1, max_length=MAX_REQUEST_ID_CHARS)]
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: str | None = None
    credits: NumCredits | None = None


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    """The stream may have so many more deltas. There is no answer."""

    request_id: RequestId
    credits: NumCredits


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """No more tokens are wanted. There is no answer: late tokens are to be dropped."""

    request_id: RequestId


class LoadAdapter(Call, frozen=True, tag="load_adapter"):
    """Register an adapter; answered with ``Registered``. ``replace`` puts it in another's place."""

    call_id: CallId
    name: str
    path: str
    pinned: bool = False
    replace: bool = False


class UnloadAdapter(Call, frozen=True, tag="unload_adapter"):
    """Forget an adapter; answered with ``Unregistered``. Accepted requests are still served."""

    call_id: CallId
    name: str


MAX_PREFETCH_HINTS = 64
"""Adapters that may be hinted at, in one message and at a time."""


class PrefetchAdapters(Call, frozen=True, tag="prefetch_adapters"):
    """These are likely to be asked for; answered with ``Prefetching``. All are known, or none."""

    call_id: CallId
    names: list[str]


class ListAdapters(Call, frozen=True, tag="list_adapters"):
    """Answered with ``AdapterList``; only ``with_folder`` is the adapter folder looked into."""

    call_id: CallId
    with_folder: bool = True


class GetStats(Call, frozen=True, tag="get_stats"):
    """Answered with ``EngineStats``."""

    call_id: CallId


class GetHealth(Call, frozen=True, tag="get_health"):
    """Answered with ``Health``."""

    call_id: CallId


class GetActivity(Call, frozen=True, tag="get_activity"):
    """Answered with ``Activity``."""

    call_id: CallId


ClientCall = (
    Connect
    | LoadAdapter
    | UnloadAdapter
    | PrefetchAdapters
    | ListAdapters
    | GetStats
    | GetHealth
    | GetActivity
)
"""All that have a ``call_id``, and one answer of their own."""

ClientMessage = ClientCall | Generate | Credit | Cancel | Ping


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Who the engine is. ``eos_token_ids`` and lengths are the model's own.

    Either side sends something at least every ``heartbeat_interval_ms``, if only a ``Ping``.
    """

    call_id: CallId
    engine_epoch: Epoch
    architecture: str
    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: tuple[int, ...]
    heartbeat_interval_ms: int
    protocol_version: int = PROTOCOL_VERSION


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to ``Ping``."""


class TokenDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step, or several whose deltas were joined, add to one request.

    The delta that carries ``finish_reason`` or ``error`` is the request's last, and there is
    exactly one such. ``num_cached_tokens`` (of the prompt) is set in the first delta.
    """

    request_id: RequestId
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int = 0


class StepOutputs(msgspec.Struct, frozen=True, tag="step_outputs"):
    """All that one engine step has for one client."""

    deltas: list[TokenDelta]


class Registered(msgspec.Struct, frozen=True, tag="registered"):
    """The adapter may be asked for from now on."""

    call_id: CallId
    adapter: "AdapterStatus"


class Unregistered(msgspec.Struct, frozen=True, tag="unregistered"):
    """No later request finds the adapter."""

    call_id: CallId
    name: str


class Residency(Enum):
    """The fastest tier that holds all of an adapter."""

    DISK = "disk"
    HOST = "host"
    LOADING = "loading"
    GPU = "gpu"


class AdapterStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One registered adapter. ``image_bytes`` and ``max_rank`` are 0 until it was inspected."""

    name: str
    path: str
    adapter_id: AdapterId
    pinned: bool
    residency: Residency
    image_bytes: int = 0
    max_rank: int = 0
    created_s: int = 0


class Prefetching(msgspec.Struct, frozen=True, tag="prefetching"):
    """The hint is taken. The adapters in the order of their names in it, as they are now."""

    call_id: CallId
    adapters: list[AdapterStatus]


class AdapterList(msgspec.Struct, frozen=True, tag="adapter_list"):
    """Registered adapters in order of name; then the names of the adapter folder not yet used."""

    call_id: CallId
    adapters: list[AdapterStatus]
    folder_names: list[str]


class EngineStats(msgspec.Struct, frozen=True, tag="engine_stats"):
    """Counters since the engine's start and gauges of now."""

    call_id: CallId
    engine_epoch: Epoch
    loader_connected: bool
    num_running: int
    num_waiting: int
    num_waiting_for_adapter: int
    kv_blocks_total: int
    kv_blocks_used: int
    prompt_tokens_total: int
    cached_prompt_tokens_total: int
    generation_tokens_total: int
    step_waits_total: int
    step_wait_seconds_total: float
    layer_jobs_total: int
    layer_groups_total: int
    preemptions_total: int
    num_paused: int
    pauses_total: int
    dropped_pauses_total: int
    longest_pause_s: float
    rotations_total: int
    pool_bytes_total: int
    pool_bytes_used: int
    adapters_resident: int
    stale_chunks_total: int
    steps: StepStats
    loads: LoadStats
    hits: AdapterHits
    loader: LoaderStats


class ServingStatus(Enum):
    """As in gRPC's health protocol."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"


class Health(msgspec.Struct, frozen=True, tag="health"):
    """Whether steps go on, and whether an adapter that is not on the GPU could be loaded."""

    call_id: CallId
    status: ServingStatus
    engine_epoch: Epoch
    loader_connected: bool


class HostImage(msgspec.Struct, frozen=True):
    """One adapter in the loader's memory."""

    adapter_id: AdapterId
    num_bytes: int


class Activity(msgspec.Struct, frozen=True, tag="activity"):
    """What is where, and what the last minute was spent with: for people to look at.

    ``names`` has those of the adapters that are still registered, of all that are mentioned.
    ``host_images`` are the largest ones, up to a bound, of ``num_host_images``.
    """

    call_id: CallId
    engine_epoch: Epoch
    loader_connected: bool
    pool_bytes_total: int
    pool_bytes_used: int
    host_tier_bytes_total: int
    host_tier_bytes_used: int
    host_images: list[HostImage]
    num_host_images: int
    names: dict[AdapterId, str]
    step_thread: StepThreadActivity


class CallFailed(msgspec.Struct, frozen=True, tag="call_failed"):
    """The answer to any call that could not be carried out."""

    call_id: CallId
    error: ErrorInfo


class MessageRejected(msgspec.Struct, frozen=True, tag="message_rejected"):
    """The client sent what belongs to no call: it could not be read, or contradicts another."""

    error: ErrorInfo


EngineMessage = (
    Welcome
    | Pong
    | StepOutputs
    | Registered
    | Unregistered
    | Prefetching
    | AdapterList
    | EngineStats
    | Health
    | Activity
    | CallFailed
    | MessageRejected
)


# --- Engine ↔ loader ---------------------------------------------------------------------------


class FileIdentity(msgspec.Struct, frozen=True, array_like=True):
    """What ``fstat`` says of a file; any rewrite changes it."""

    name: str
    device: int
    inode: int
    num_bytes: int
    mtime_ns: int


class Generation(msgspec.Struct, frozen=True):
    """Which bytes an adapter is made of.

    ``counter`` is the registration's ``AdapterId``; ``digest`` is over the configuration and the
    tensor headers.
    """

    counter: AdapterId
    files: tuple[FileIdentity, ...]
    digest: str


class Manifest(msgspec.Struct, frozen=True):
    """All that the engine needs to know of an inspected adapter.

    ``path`` is absolute and free of symbolic links; ``image_bytes`` is the size of the layout
    that ``layout_image`` gives for ``modules``.
    """

    path: str
    generation: Generation
    format: str
    modules: tuple[AdapterModule, ...]
    max_rank: int
    image_bytes: int
    file_bytes: int


class AdapterSource(msgspec.Struct, frozen=True):
    """Enough for any loader, also a new one, to find and verify an adapter's bytes."""

    path: str
    generation: Generation


class EngineHello(msgspec.Struct, frozen=True, tag="engine_hello"):
    """The engine's half of the handshake: what adapters have to fit.

    ``base_files`` are those of the base model's weights as they were when they were read, in order
    of their names; None where the weights are of no file.
    """

    base: BaseModel
    max_lora_rank: int
    base_files: tuple[FileIdentity, ...] | None = None


class Inspect(msgspec.Struct, frozen=True, tag="inspect"):
    """Read an adapter's configuration and headers; answered with ``Inspected`` or its failure."""

    call_id: CallId
    adapter_id: AdapterId
    path: str


class InspectFolder(msgspec.Struct, frozen=True, tag="inspect_folder"):
    """As ``Inspect``, for the adapter called ``name`` in ``--lora-dir``."""

    call_id: CallId
    adapter_id: AdapterId
    name: str


class ListFolder(msgspec.Struct, frozen=True, tag="list_folder"):
    """Which adapters ``--lora-dir`` has; answered with ``FolderNames``."""

    call_id: CallId


class Warm(msgspec.Struct, frozen=True, tag="warm"):
    """Bring these into the host tier; the whole list, most urgent first, replaces the last one."""

    sources: list[AdapterSource]


class Stage(msgspec.Struct, frozen=True, tag="stage"):
    """Stream an image through the ring: its slot is reserved. Loads go in order of arrival."""

    load_id: LoadId
    source: AdapterSource


class CancelLoad(msgspec.Struct, frozen=True, tag="cancel_load"):
    """Stop a load. Chunks that were announced, or soon are, are still released one by one."""

    load_id: LoadId


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """The adapter will not be asked for again: its image may leave the host tier."""

    adapter_id: AdapterId


EngineToLoader = (
    EngineHello | Inspect | InspectFolder | ListFolder | Warm | Stage | CancelLoad | Forget
)


class LoaderHello(msgspec.Struct, frozen=True, tag="loader_hello"):
    """The loader's half: its first message; it has mapped the ring of this engine epoch."""

    host_tier_bytes: int


class Inspected(msgspec.Struct, frozen=True, tag="inspected"):
    """The answer to ``Inspect`` and ``InspectFolder``."""

    call_id: CallId
    manifest: Manifest


class FolderNames(msgspec.Struct, frozen=True, tag="folder_names"):
    """The answer to ``ListFolder``, sorted; empty without ``--lora-dir``."""

    call_id: CallId
    names: list[str]


class LoaderCallFailed(msgspec.Struct, frozen=True, tag="loader_call_failed"):
    """The answer to an ``Inspect``, ``InspectFolder`` or ``ListFolder`` that failed."""

    call_id: CallId
    error: ErrorInfo


class LoadTiming(msgspec.Struct, frozen=True):
    """Where a load's bytes came from and its time went, in seconds on the loader's monotonic clock.

    ``queue_s`` is how long it took from the load's arrival until its adapter was being read, or,
    ``from_host_tier``, until its first chunk was being copied: files are opened and row scales
    computed meanwhile. ``copy_s`` is the sum of its chunks' copies into the ring, each from its
    begin, or the end of the chunk before if that was later.
    """

    queue_s: float
    copy_s: float
    num_bytes: int
    from_host_tier: bool


class LoadSent(msgspec.Struct, frozen=True, tag="load_sent"):
    """The load's last ``ChunkReady`` was sent before."""

    load_id: LoadId
    timing: LoadTiming


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    """No chunk of this load is announced any more."""

    load_id: LoadId
    error: ErrorInfo


class ReadTiming(msgspec.Struct, frozen=True, array_like=True):
    """How long it took to make an image of an adapter's files, of which ``file_bytes`` were read.

    The time from the read's begin until the image was whole and verified, that for which the
    threads were at more urgent images included, is ``read_s`` and ``dequantize_s`` together. It is
    divided as the threads' time at this image was, between reading and converting: to dequantize,
    scale, cast, check and pad.
    """

    file_bytes: int
    read_s: float
    dequantize_s: float


class HostTierChanged(msgspec.Struct, frozen=True, tag="host_tier_changed"):
    """Which images entered and left the host tier since the last such message.

    ``reads`` are those of the images that entered, also where they have left again;
    ``num_evictions`` counts those that left to make room for others.
    """

    added: list[AdapterId]
    removed: list[AdapterId]
    used_bytes: int
    reads: list[ReadTiming] = []
    num_evictions: int = 0


LoaderToEngine = (
    LoaderHello
    | Inspected
    | FolderNames
    | LoaderCallFailed
    | LoadSent
    | LoadFailed
    | HostTierChanged
)


class FromEngine(msgspec.Struct, frozen=True, array_like=True):
    """The envelope: a loader drops what is not meant for its own pair of epochs."""

    engine_epoch: Epoch
    loader_epoch: Epoch
    body: EngineToLoader


class FromLoader(msgspec.Struct, frozen=True, array_like=True):
    """The envelope: an engine drops what comes from another pair of epochs."""

    engine_epoch: Epoch
    loader_epoch: Epoch
    body: LoaderToEngine


# --- Chunks of the staging ring ------------------------------------------------------------------

# These have no envelope: their connection is one loader's with one engine, and ends with either.


class ChunkReady(msgspec.Struct, frozen=True, array_like=True, tag="chunk_ready"):
    """``[image_offset, image_offset + num_bytes)`` of a load's image lies in the ring.

    A load's chunks come in order of their offsets, without gaps. The one that reaches the
    image's end was sent only after the files were found unchanged behind the last read.
    """

    load_id: LoadId
    chunk: int
    image_offset: int
    num_bytes: int


class ChunkReleased(msgspec.Struct, frozen=True, array_like=True, tag="chunk_released"):
    """The engine has copied the chunk, or wants none of it; it may be filled again."""

    chunk: int


# --- Handover of descriptors -------------------------------------------------------------------


class LoaderProcess(msgspec.Struct, frozen=True, tag="loader_process"):
    """From the supervisor, with the loader's pidfd: who may write into the ring from now on."""

    loader_epoch: Epoch


class RingRequest(msgspec.Struct, frozen=True, tag="ring_request"):
    """From the loader. The connection stays open: its end is the engine's end.

    Once ``RingGrant`` has come back over it, it carries chunks alone.
    """

    loader_epoch: Epoch


class RingKind(Enum):
    """What kind of memory the descriptor of a ``RingGrant`` names."""

    HOST = "host"
    CUDA = "cuda"


class RingGrant(msgspec.Struct, frozen=True, tag="ring_grant"):
    """To the loader, with the ring's descriptor. Every chunk is free."""

    engine_epoch: Epoch
    kind: RingKind
    num_chunks: int
    chunk_bytes: int


HandoverMessage = LoaderProcess | RingRequest | RingGrant


# --- Chat templates ------------------------------------------------------------------------------


class LoadTemplates(msgspec.Struct, frozen=True, tag="load_templates"):
    """The first message: what all later ones are about.

    ``sources`` are templates by their names, ``special_tokens`` texts by theirs. The child's
    address space may grow by ``max_memory_bytes`` from then on.
    """

    sources: dict[str, str]
    special_tokens: dict[str, str]
    max_memory_bytes: int
    max_prompt_chars: int


class RenderChat(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, tag="render_chat"):
    """What a prompt is to be made of.

    ``variables`` are the request's ``chat_template_kwargs``. With ``continue_final_message`` the
    prompt ends where the last message's content does.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TemplatesLoaded(msgspec.Struct, frozen=True, tag="templates_loaded"):
    """Every template of a ``LoadTemplates`` can be rendered."""


class PromptRendered(msgspec.Struct, frozen=True, tag="prompt_rendered"):
    """The prompt of a ``RenderChat``."""

    prompt: str


class TemplateRefused(msgspec.Struct, frozen=True, tag="template_refused"):
    """Why there are no templates, or no prompt."""

    error: ErrorInfo


TemplateCall = LoadTemplates | RenderChat
TemplateAnswer = TemplatesLoaded | PromptRendered | TemplateRefused
