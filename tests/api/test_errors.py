"""Every refusal has OpenAI's shape, names the field, and costs nobody anything."""

from typing import Any

import httpx
import pytest

from ipc.errors import (
    AdapterInvalid,
    AdapterNotFound,
    Internal,
    InvalidRequest,
    Overloaded,
    SidestreamError,
    Unavailable,
)
from tests.api.fake_engine import MAX_MODEL_LEN, fails, says
from tests.api.frontend import Frontend, error, frontend, on_loop

JSON = {"content-type": "application/json"}


async def refused(front: Frontend, status: int, **fields: Any) -> dict[str, Any]:
    details = error(await front.complete(**fields), status)
    assert front.engine.requests == []
    return details


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"temperature": "warm"}, "temperature: expected `float | null`, got `str`", "temperature"),
        ({"max_tokens": 1.5}, "max_tokens: expected `int | null`, got `float`", "max_tokens"),
        ({"stream": 1}, "stream: expected `bool | null`, got `int`", "stream"),
        ({"n": 0}, "n: expected `int` >= 1, got 0", "n"),
        ({"n": 129}, "n: expected at most 128, got 129", "n"),
        ({"prompt": [1, "a"]}, "got a mixture of strings and token ids", "prompt"),
        ({"prompt": []}, "got an empty array", "prompt"),
        ({"prompt": [1, 2.5]}, "prompt[1]: expected `int | str | array`", "prompt[1]"),
        ({"prompt": {"a": 1}}, "prompt: expected `str | array`, got `object`", "prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected `int`, got `str`", "logit_bias"),
        ({"stop": ""}, "stop: expected strings of [1, 1024] characters, got one of 0", "stop"),
        ({"stop": ["a"] * 33}, "stop: expected at most 32 strings, got 33", "stop"),
        ({"best_of": 1, "n": 2}, "best_of: expected at least n (2), got 1", "best_of"),
        ({"best_of": 2, "stream": True}, "best_of: expected n (1) together with", "best_of"),
        ({"best_of": 129}, "best_of: expected at most 128, got 129", "best_of"),
        ({"prompt": ["a"] * 20, "best_of": 60}, "at most 1024 choices in all", "prompt"),
        ({"echo": True, "logprobs": 1}, "echo: expected false together with logprobs", "echo"),
        ({"logprobs": 21}, "logprobs: expected one of [0, 20], got 21", "logprobs"),
        ({"stream_options": {}}, "stream_options: expected only together with", "stream_options"),
        (
            {"suffix": "x"},
            'suffix is not supported: expected it absent, null or "", got "x"',
            "suffix",
        ),
        ({"tools": [{}]}, "tools is not supported: expected it absent, null or [], got", "tools"),
        ({"prompt": ["a"] * 20, "n": 60}, "expected at most 1024 choices in all", "prompt"),
        ({"prompt": [1, 2, -1], "echo": True}, "token id -1 at position 2 of the", "prompt"),
        ({"prompt": [1, 2**80]}, f"token id {2**80} at position 1 of the prompt", "prompt"),
        ({"seed": 2**80}, "seed: expected `int` <= 9223372036854775807", "seed"),
        ({"model": None}, "model: expected `str`, got `null`", "model"),
    ],
)
@on_loop
async def test_a_wrong_field_is_named_with_what_was_expected_and_got(
    fields: dict[str, Any], message: str, param: str | None
) -> None:
    async with frontend() as front:
        details = await refused(front, 400, **fields)
    assert message in details["message"]
    assert details["param"] == param
    assert details["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": None, "function_call": "auto", "response_format": {"type": "text"}},
        {"best_of": 1, "suffix": None, "guided_json": None, "use_beam_search": False},
        {"user": "u", "priority": 1, "metadata": {}, "nobody_knows": [1]},
    ],
)
@on_loop
async def test_fields_that_ask_for_nothing_or_are_unknown_are_ignored(
    fields: dict[str, Any],
) -> None:
    async with frontend() as front:
        assert (await front.complete(**fields)).status_code == 200


@pytest.mark.parametrize("name", ["response_format", "functions", "reasoning_effort"])
@on_loop
async def test_a_chat_refuses_by_name_what_would_change_its_answer(name: str) -> None:
    async with frontend() as front:
        details = error(await front.chat(**{name: [{"type": "x"}]}), 400)
    assert details["param"] == name and name in details["message"]


@on_loop
async def test_top_logprobs_are_named_as_the_client_named_them() -> None:
    async with frontend() as front:
        assert error(await front.chat(top_logprobs=2), 400)["param"] == "top_logprobs"
        too_many = error(await front.chat(logprobs=True, top_logprobs=21), 400)
    assert too_many["message"] == "top_logprobs: expected one of [0, 20], got 21"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON"),
        (b'{"model": ', "the body is not JSON"),
        (b'{"model": "\xff"}', "the body is not JSON"),
        (b'{"model": "base", "prompt": NaN}', "the body is not JSON"),
        (b"[1]", "the body: expected `object`, got `array`"),
        (b'{"model": "base"}', "prompt: this field is required"),
        (b'{"prompt": "x"}', "model: this field is required"),
        (b'{"model": "base", "prompt": "x", "z": ' + b"[" * 50_000 + b"}", "the body is nested"),
    ],
)
@on_loop
async def test_a_body_that_is_no_request_is_400(body: bytes, message: str) -> None:
    async with frontend() as front:
        response = await front.http.post("/v1/completions", content=body, headers=JSON)
        assert message in error(response, 400)["message"]


@on_loop
async def test_a_body_above_the_limit_is_413_whether_announced_or_not() -> None:
    async with frontend(max_body_bytes=100) as front:
        announced = await front.http.post("/v1/completions", content=b"x" * 101, headers=JSON)

        async def parts() -> Any:
            for _ in range(30):
                yield b"x" * 10

        chunked = await front.http.post("/v1/completions", content=parts(), headers=JSON)
    for response in (announced, chunked):
        assert "expected at most 100" in error(response, 413)["message"]


@on_loop
async def test_a_prompt_that_is_too_long_names_both_lengths() -> None:
    async with frontend() as front:
        details = await refused(front, 400, prompt=[1] * MAX_MODEL_LEN)
        assert details["code"] == "context_length_exceeded" and details["param"] == "prompt"
        assert "has 256 tokens: expected at most 255" in details["message"]
        chat = error(await front.chat("x" * 300), 400)
        assert chat["param"] == "messages" and chat["code"] == "context_length_exceeded"


@on_loop
async def test_a_prompt_and_an_answer_that_are_too_long_together_name_all_lengths() -> None:
    async with frontend() as front:
        details = await refused(front, 400, prompt=[1] * 200, max_tokens=57)
        assert details["code"] == "context_length_exceeded"
        assert "max_tokens 57 and a prompt of 200 tokens make 257" in details["message"]
        assert (await front.complete([1] * 200, max_tokens=56)).status_code == 200


@on_loop
async def test_text_is_refused_where_there_is_no_tokenizer() -> None:
    async with frontend(tokenizer=False) as front:
        details = await refused(front, 400, prompt="text")
        assert "tokenizer.json" in details["message"] and details["param"] == "prompt"
        details = await refused(front, 400, prompt=[1], stop="x")
        assert details["param"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_an_unknown_model_is_404_with_openais_code(stream: bool) -> None:
    async with frontend(fails(AdapterNotFound("no adapter 'nobody'"))) as front:
        details = error(await front.complete(model="nobody", stream=stream), 404)
        assert error(await front.chat(model="nobody", stream=stream), 404) == details
    assert details["code"] == "model_not_found" and details["param"] == "model"
    assert "the model 'nobody' does not exist" in details["message"]


@pytest.mark.parametrize(
    ("raised", "status", "retry_after"),
    [
        (InvalidRequest("no", param="top_p"), 400, None),
        (AdapterInvalid("broken"), 422, None),
        (Overloaded("full", retry_after_s=0.2), 429, "1"),
        (Internal("oops"), 500, None),
        (Unavailable("away", retry_after_s=3.5), 503, "4"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_what_the_engine_refuses_has_its_status_also_when_streamed(
    raised: SidestreamError, status: int, retry_after: str | None, stream: bool
) -> None:
    async with frontend(fails(raised)) as front:
        response = await front.complete(stream=stream)
    details = error(response, status)
    assert details["message"] == raised.message and details["param"] == raised.param
    assert response.headers.get("retry-after") == retry_after


@on_loop
async def test_the_engines_prompt_is_the_clients_messages() -> None:
    async with frontend(fails(InvalidRequest("too long", param="prompt"))) as front:
        assert error(await front.chat(), 400)["param"] == "messages"


@on_loop
async def test_unknown_paths_and_methods_have_openais_shape() -> None:
    async with frontend() as front:
        missing = error(await front.http.get("/v1/nothing"), 404)
        wrong = await front.http.get("/v1/completions")
    assert missing["message"] == "no such path: GET /v1/nothing"
    assert "expected the method POST, got GET" in error(wrong, 405)["message"]
    assert wrong.headers["allow"] == "POST"


@on_loop
async def test_a_request_keeps_its_id_and_others_are_given_one() -> None:
    async with frontend() as front:
        own = await front.http.post(
            "/v1/completions",
            json={"model": "base", "prompt": "x"},
            headers={"x-request-id": "mine-1"},
        )
        assert front.engine.requests[0].request_id.startswith("mine-1-")
        forged = await front.http.get("/health", headers={"x-request-id": "a b\tc"})
        missing = await front.http.get("/nothing")
    assert own.headers["x-request-id"] == "mine-1" and own.json()["id"] == "cmpl-mine-1"
    assert len(forged.headers["x-request-id"]) == 32
    assert len(missing.headers["x-request-id"]) == 32


@on_loop
async def test_a_defect_is_500_and_its_details_stay_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with frontend() as front:
        monkeypatch.setattr(front.client, "generate", None)
        response: httpx.Response = await front.complete()
    assert "NoneType" not in error(response, 500)["message"]
    assert "NoneType" in caplog.text


@on_loop
async def test_one_refused_request_does_not_disturb_another() -> None:
    async with frontend(says("ok")) as front:
        await front.complete(n=0)
        assert (await front.complete()).json()["choices"][0]["text"] == "ok"
