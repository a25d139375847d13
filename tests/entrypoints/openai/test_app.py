"""What the application does around its engine: keys, origins, limits, refusals, and errors in every place where one may come."""

import json
import time

import pytest

from tests.entrypoints.openai.fake_engine import FakeEngine, app_of, ask
from vllm.config import ModelConfig, VllmConfig
from vllm.config.checkpoint import TINY
from vllm.entrypoints.openai import middleware
from vllm.v1.engine.exceptions import EngineDeadError, EngineOverloadedError, EngineStalledError

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


def status(app, path="/v1/models", **headers):
    return ask(app, "GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()}).status_code


def test_keys_guard_v1_and_nothing_else():
    app = app_of(api_key=["secret", "other"])
    assert status(app) == 401 and status(app, Authorization="Bearer wrong") == 401
    assert status(app, Authorization="secret") == 401 and status(app, Authorization="Basic secret") == 401
    assert status(app, Authorization="Bearer secre") == 401 and status(app, Authorization="Bearer ") == 401
    assert status(app, Authorization="Bearer secret") == status(app, Authorization="bearer other") == 200
    for path in ("/health", "/version", "/load", "/ping"):
        assert status(app, path) == 200
    assert ask(app, "POST", "/tokenize", json={"prompt": "a"}).status_code == 200
    refused = ask(app, "POST", PATH, json=CHAT)
    assert refused.json()["error"]["code"] == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert "secret" not in refused.text


def test_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert status(app_of()) == 401 and status(app_of(), Authorization="Bearer secret") == 200
    assert status(app_of(api_key=["mine"]), Authorization="Bearer secret") == 401


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = middleware.hmac.compare_digest
    monkeypatch.setattr(middleware.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    app = app_of(api_key=["a", "b" * 100])
    for key in ("a", "x", "b" * 5000):
        status(app, Authorization=f"Bearer {key}")
    assert compared == [(32, 32)] * 6


def test_a_root_path():
    app = app_of(root_path="/llm", api_key=["k"])
    for path in ("/v1/models", "/llm/v1/models"):
        assert status(app, path) == 401 and status(app, path, Authorization="Bearer k") == 200
    assert status(app, "/llm/health") == 200
    assert ask(app, "GET", "/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_origins():
    preflight = {"Origin": "http://a", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
    app = app_of(api_key=["k"])
    assert ask(app, "OPTIONS", PATH, headers=preflight).headers["access-control-allow-origin"] == "*"
    app = app_of(allowed_origins=["http://a"], allowed_methods=["POST"], allow_credentials=True)
    allowed = ask(app, "OPTIONS", PATH, headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == "http://a"
    assert allowed.headers["access-control-allow-credentials"] == "true"
    assert "access-control-allow-origin" not in ask(app, "GET", "/v1/models", headers={"Origin": "http://b"}).headers


def test_docs_may_be_left_out():
    assert status(app_of(), "/docs") == status(app_of(), "/openapi.json") == 200
    app = app_of(disable_fastapi_docs=True)
    assert status(app, "/docs") == status(app, "/openapi.json") == status(app, "/redoc") == 404


def test_the_largest_body():
    app = app_of(max_body_size=200)
    assert ask(app, "POST", PATH, json=CHAT).status_code == 200
    large = json.dumps({**CHAT, "user": "x" * 200}).encode()

    async def pieces():
        for start in range(0, len(large), 50):
            yield large[start : start + 50]

    for content in (large, pieces()):
        refused = ask(app, "POST", PATH, content=content)
        assert refused.status_code == 413 and "--max-body-size" in refused.json()["error"]["message"]


def test_draining():
    app = app_of()
    app.state.context.draining = True
    for path, method in (("/health", "GET"), ("/ping", "GET"), (PATH, "POST"), ("/v1/completions", "POST")):
        refused = ask(app, method, path, json=CHAT)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert status(app, "/version") == status(app, "/v1/models") == 200


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_requests(stream):
    engine = FakeEngine(refuses=EngineOverloadedError("256 sequences run or wait", retry_after=3))
    refused = ask(app_of(engine), "POST", PATH, json={**CHAT, "stream": stream})
    assert refused.status_code == 503 and refused.headers["retry-after"] == "3"
    assert refused.json()["error"]["message"] == "256 sequences run or wait" and engine.open == 0


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("abort", 400, "the answer was given up: its text could not go on in the form that was asked for"),
        ("abort its structured output cannot be compiled", 400, "given up: its structured output cannot be compiled"),
        ("abort the server is shutting down", 503, "the request was aborted: the server is shutting down"),
    ],
)
def test_an_answer_that_cannot_keep_its_form(end, code, message):
    """Not the server's end, and nothing that trying again would help."""
    body = {**CHAT, "structured_outputs": {"regex": "a+"}}
    refused = ask(app_of(FakeEngine("4", end)), "POST", PATH, json=body)
    assert refused.status_code == code and message in refused.json()["error"]["message"]


def test_an_engine_that_hangs():
    """It takes requests, which may yet be answered; /health tells."""
    engine = FakeEngine("46")
    engine.dead = EngineStalledError("a step of the engine has taken 400 s so far")
    app = app_of(engine)
    for path in ("/health", "/ping"):
        refused = ask(app, "GET", path)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, str(engine.dead))
    engine.dead = None
    assert ask(app, "GET", "/health").status_code == 200


def test_several_names():
    names = ["first", "second"]
    config = VllmConfig.create(ModelConfig(model=str(TINY), served_model_name=[*names, "first"]), device="cpu")
    app = app_of(FakeEngine("46", config=config))
    for path in ("/v1/models", "/v1/models/"):
        assert [card["id"] for card in ask(app, "GET", path).json()["data"]] == names
    assert ask(app, "GET", "/v1/models/second").json()["id"] == "second"
    for name in (*names, None):
        assert ask(app, "POST", PATH, json={**CHAT, "model": name}).json()["model"] == "first"
    refused = ask(app, "POST", PATH, json={**CHAT, "model": "third"})
    assert refused.status_code == 404 and "this server has: first, second" in refused.json()["error"]["message"]


def test_head():
    """As GET, without the body."""
    app = app_of()
    for path in ("/health", "/ping", "/version", "/load", "/v1/models", "/openapi.json", "/nowhere"):
        head, get = ask(app, "HEAD", path), ask(app, "GET", path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers.get("content-length") == get.headers.get("content-length")
    refused = ask(app, "HEAD", PATH)
    assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")
    assert ask(app_of(api_key=["k"]), "HEAD", "/v1/models").status_code == 401


def test_a_dead_engine():
    engine = FakeEngine(refuses=EngineDeadError("the engine process was killed"))
    engine.dead = engine.refuses
    app = app_of(engine)
    for method, path in (("GET", "/health"), ("POST", PATH)):
        refused = ask(app, method, path, json=CHAT)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the engine process was killed")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineDeadError("it was killed"), 503, "it was killed"),
        (RuntimeError("a secret of ours"), 500, "internal error; the server's log says more"),
        ("abort the server is shutting down", 503, "the request was aborted: the server is shutting down"),
        ("abort", 503, "the request was aborted: the engine has dropped it"),
    ],
)
def test_an_error_on_the_way(error, code, message):
    for before in ((), ("4",)):
        engine = FakeEngine(*before, error)
        app = app_of(engine)
        whole = ask(app, "POST", PATH, json=CHAT)
        assert (whole.status_code, whole.json()["error"]["message"]) == (code, message)
        stream = ask(app, "POST", PATH, json={**CHAT, "stream": True})
        assert engine.open == 0
        if not before:  # nothing was sent yet, so the status can still tell
            assert (stream.status_code, stream.json()["error"]["message"]) == (code, message)
            continue
        *events, last, end = stream.text.strip().split("\n\n")
        assert stream.status_code == 200 and len(events) == 2 and end == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == message
        several = ask(app, "POST", "/v1/completions", json={"prompt": ["a", "b"], "stream": True})
        assert message in several.text and engine.open == 0


def test_what_the_engine_gets():
    engine = FakeEngine("46")
    app = app_of(engine, default_chat_template_kwargs={"enable_thinking": False})
    ask(
        app,
        "POST",
        PATH,
        json={**CHAT, "max_tokens": 5, "request_id": "mine", "n": None, "stop": "x", "logprobs": True},
    )
    prompt, params, request_id, priority = engine.requests.pop()
    assert prompt["prompt"].endswith("</think>\n\n") and request_id.startswith("chatcmpl-mine-") and priority == 0
    assert (params.max_tokens, params.stop, params.logprobs, params.n) == (5, ["x"], 0, 1)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.95), "the model's own defaults"
    ask(app, "POST", PATH, json={**CHAT, "chat_template_kwargs": {"enable_thinking": True}})
    prompt, params, *_ = engine.requests.pop()
    assert prompt["prompt"].endswith("<think>\n") and params.max_tokens is None
    ask(app, "POST", "/v1/completions", json={"prompt": "a"})
    assert engine.requests.pop()[1].max_tokens == 16


def test_templates_of_requests():
    own = {**CHAT, "chat_template": "{{ messages[0].content }}!"}
    assert ask(app_of(), "POST", PATH, json=own).status_code == 400
    engine = FakeEngine("46")
    app = app_of(engine, trust_request_chat_template=True)
    assert ask(app, "POST", PATH, json=own).status_code == 200 and engine.requests[0][0]["prompt"] == "Hi!"
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
    ):
        refused = ask(app, "POST", PATH, json={**CHAT, "chat_template": template})
        assert refused.status_code == 400 and "template" in refused.json()["error"]["message"], template


def test_the_server_s_own_template(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}?")
    for template in (str(file), "{{ messages[0].content }}?"):
        engine = FakeEngine("46")
        parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
        ask(app_of(engine, chat_template=template), "POST", PATH, json={"messages": parts})
        assert engine.requests[0][0]["prompt"] == "a\nb?", "a template that takes strings only"
    with pytest.raises(ValueError, match="--chat-template"):
        app_of(chat_template="{% if %}")


def test_tools_need_a_parser():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    body = {**CHAT, "tools": tools}
    for args, flags in (
        ({}, ["--enable-auto-tool-choice", "--tool-call-parser"]),
        ({"tool_call_parser": "hermes"}, ["--enable-auto-tool-choice"]),
    ):
        refused = ask(app_of(**args), "POST", PATH, json=body)
        assert refused.status_code == 400
        assert all(flag in refused.json()["error"]["message"] for flag in flags)
        assert ask(app_of(**args), "POST", PATH, json={**body, "tool_choice": "none"}).status_code == 200
    engine = FakeEngine('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>')
    app = app_of(engine, tool_call_parser="hermes", enable_auto_tool_choice=True)
    (call,) = ask(app, "POST", PATH, json=body).json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}


def test_usage_at_the_end_of_every_stream():
    app = app_of(FakeEngine("4", "6"), enable_force_include_usage=True)
    events = ask(app, "POST", PATH, json={**CHAT, "stream": True}).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens"] == 2
    assert "prompt_tokens_details" not in events[-3]


def test_requests_are_logged_only_when_asked(caplog):
    caplog.set_level("INFO", "vllm")
    ask(app_of(), "POST", PATH, json=CHAT)
    assert not [r for r in caplog.records if "Request" in r.getMessage()]
    ask(app_of(enable_log_requests=True), "POST", PATH, json={**CHAT, "request_id": "mine"})
    lines = [r.getMessage() for r in caplog.records if "chatcmpl-mine" in r.getMessage()]
    assert len(lines) == 2 and "prompt tokens" in lines[0] and "done" in lines[1]


def test_the_tokenizer_is_shown_only_when_asked():
    assert status(app_of(), "/tokenizer_info") == 404
    assert status(app_of(enable_tokenizer_info_endpoint=True), "/tokenizer_info") == 200


def test_a_long_prompt_is_refused_before_it_is_tokenised():
    app = app_of()
    start = time.perf_counter()
    refused = ask(app, "POST", "/v1/completions", json={"prompt": "word " * 2_000_000})
    assert refused.status_code == 400 and "maximum context length" in refused.json()["error"]["message"]
    assert time.perf_counter() - start < 5
