"""What becomes of requests, and what their clients get."""

from engine.commands import AddRequest
from engine.open_requests import OpenRequests
from engine.plan import SampledToken
from ipc.errors import Unavailable
from ipc.messages import AdapterId, FinishReason, RequestId, SamplingParams, TokenDelta
from tests.engine.builders import Policy, make_manifest

ADAPTER = AdapterId(1)


def request(
    name: str,
    client: bytes = b"one",
    adapter_id: AdapterId | None = None,
    sampling: SamplingParams | None = None,
) -> AddRequest:
    sampling = sampling or SamplingParams()
    return AddRequest(client, RequestId(name), adapter_id, [1, 2, 3], 2, sampling, 0.0)


def errors(requests: OpenRequests, client: bytes = b"one") -> list[str]:
    deltas = requests.take_deltas().get(client, [])
    return [delta.error.message for delta in deltas if delta.error is not None]


def step(policy: Policy, requests: OpenRequests, token_id: int) -> None:
    """Every sequence of the step draws ``token_id``."""
    plan = policy.scheduler.schedule(0.0)
    policy.scheduler.launched(plan)
    sampled = [SampledToken(token_id, None) for chunk in plan.chunks if chunk.samples]
    for progress in policy.scheduler.complete(plan, sampled):
        requests.report(progress)


def test_who_comes_when_too_many_wait_is_told_to_come_later() -> None:
    policy = Policy()
    requests = OpenRequests(policy.scheduler, max_waiting=2, seed=0)
    for name in ("a", "b", "c"):
        requests.add(request(name))
    (delta,) = requests.take_deltas()[b"one"]
    assert delta.request_id == "c" and delta.error is not None
    assert delta.error.message == "2 requests are waiting: expected fewer"
    assert delta.error.retry_after_s == 1.0
    assert policy.scheduler.num_waiting == 2


def test_an_id_is_free_again_once_its_request_has_failed_or_ended() -> None:
    policy = Policy()
    requests = OpenRequests(policy.scheduler, max_waiting=9, seed=0)
    policy.residency.add(ADAPTER, make_manifest(ADAPTER), pinned=False)
    requests.add(request("a", adapter_id=ADAPTER))
    requests.add(request("a", adapter_id=ADAPTER))
    assert len(errors(requests)) == 1
    requests.fail_adapter(ADAPTER, Unavailable("it is away", retry_after_s=1.0))
    assert errors(requests) == ["it is away"]
    requests.add(request("a"))
    step(policy, requests, 7)
    step(policy, requests, 8)
    assert requests.take_deltas()[b"one"] == [
        TokenDelta(RequestId("a"), [7]),
        TokenDelta(RequestId("a"), [8], finish_reason=FinishReason.LENGTH),
    ]
    requests.add(request("a"))
    assert policy.scheduler.num_waiting == 1 and errors(requests) == []


def test_a_client_that_leaves_takes_its_own_requests_along_and_no_others() -> None:
    policy = Policy()
    requests = OpenRequests(policy.scheduler, max_waiting=9, seed=0)
    for client in (b"one", b"two"):
        requests.add(request("a", client))
        requests.add(request("b", client))
    requests.cancel(b"two", RequestId("b"))
    requests.drop_client(b"one")
    assert policy.scheduler.num_waiting == 1
    step(policy, requests, 7)
    assert requests.take_deltas() == {b"two": [TokenDelta(RequestId("a"), [7])]}


def test_only_requests_that_draw_by_chance_and_bring_no_seed_are_given_one() -> None:
    policy = Policy()
    requests = OpenRequests(policy.scheduler, max_waiting=9, seed=3)
    for name, sampling in (
        ("greedy", SamplingParams(temperature=0.0)),
        ("own", SamplingParams(temperature=1.0, seed=5)),
        ("first", SamplingParams(temperature=1.0)),
        ("second", SamplingParams(temperature=1.0)),
    ):
        requests.add(request(name, sampling=sampling))
    chunks = policy.scheduler.schedule(0.0).chunks
    greedy, own, first, second = (chunk.sequence.sampling.seed for chunk in chunks)
    assert (greedy, own) == (None, 5)
    assert first is not None and second is not None and first != second
