"""`thinking_token_budget`: the thinking is cut, and the answer follows."""

import pytest

from tests.entrypoints.openai.fake_engine import CONFIG, FakeEngine, app_of, ask
from tests.entrypoints.openai.server import chat_body

PATH = "/v1/chat/completions"
QUESTION = chat_body("What is 12+34?", chat_template_kwargs={"enable_thinking": True}, return_token_ids=True)
END = "</think>"


@pytest.fixture(scope="module")
def end_token(server):
    (token,) = server.post("/tokenize", {"prompt": END}).json()["tokens"]
    return token


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_conversations(server, end_token, budget):
    body = {**QUESTION, "thinking_token_budget": budget}
    whole = server.post(PATH, body).json()["choices"][0]
    assert whole["token_ids"].index(end_token) == budget and whole["finish_reason"] == "stop"
    message = whole["message"]
    assert message["content"].isdigit() and bool(message["reasoning"]) == (budget > 0)

    choices = [choice for event in server.stream(PATH, body) for choice in event["choices"]]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == whole["token_ids"]
    pieces = [choice["delta"] for choice in choices]
    assert "".join(piece.get("reasoning", "") for piece in pieces) == (message["reasoning"] or "")
    assert "".join(piece.get("content", "") for piece in pieces) == message["content"]


def test_more_than_it_needs(server):
    """Nor does a budget mean anything to a request that does not think."""
    for fields in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        answers = [
            server.post(PATH, {**QUESTION, **fields, **more}).json()["choices"][0]
            for more in ({}, {"thinking_token_budget": 500}, {"thinking_token_budget": -1})
        ]
        assert answers[0]["message"]["content"] == "46" and answers[1:] == answers[:1] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_completions(server, end_token, stream):
    prompt = server.post("/tokenize", {"messages": QUESTION["messages"]}).json()["tokens"]
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 40, "thinking_token_budget": 2, "return_token_ids": True}
    if stream:
        choices = [choice for event in server.stream("/v1/completions", body) for choice in event["choices"]]
    else:
        choices = server.post("/v1/completions", body).json()["choices"]
    assert [token for choice in choices for token in choice["token_ids"]].index(end_token) == 2
    thoughts, _, answer = "".join(choice["text"] for choice in choices).partition(END)
    assert thoughts and answer.strip().isdigit()


def test_several_answers_and_a_form(server):
    """Each of the n has the budget to itself; a schema holds behind it."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    fields = {"n": 3, "temperature": 1.5, "seed": 1, "thinking_token_budget": 2, "response_format": form}
    answer = server.post(PATH, {**QUESTION, **fields, "max_tokens": 60}).json()
    for choice in answer["choices"]:
        assert len(choice["message"]["reasoning"] or "") < 40
        if choice["finish_reason"] == "stop":
            int(choice["message"]["content"])
    assert any(choice["finish_reason"] == "stop" for choice in answer["choices"])


def test_wrong_values(server):
    for value in (-2, 1.5, "4", True, 1 << 80):
        refused = server.post(PATH, {**QUESTION, "thinking_token_budget": value})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "thinking_token_budget", refused.text


def test_no_parser():
    for path, body in ((PATH, QUESTION), ("/v1/completions", {"prompt": "a"})):
        refused = ask(app_of(), "POST", path, json={**body, "thinking_token_budget": 5})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "thinking_token_budget")
        assert "--reasoning-parser" in error["message"]
        assert ask(app_of(), "POST", path, json={**body, "thinking_token_budget": -1}).status_code == 200


def test_a_tokenizer_without_the_tokens():
    engine = FakeEngine("46", config=CONFIG)
    known = engine._tokenizer.convert_tokens_to_ids
    engine._tokenizer.convert_tokens_to_ids = lambda token: None if token == END else known(token)
    body = {**QUESTION, "thinking_token_budget": 5}
    refused = ask(app_of(engine, reasoning_parser="qwen3"), "POST", PATH, json=body)
    assert refused.status_code == 400 and "has no token </think>" in refused.json()["error"]["message"]
