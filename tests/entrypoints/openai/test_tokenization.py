import pytest

from tests.entrypoints.openai.server import TINY
from tests.entrypoints.openai.test_chat import WEATHER


@pytest.mark.parametrize("text", ["12+34=", "Hé ✓\n", "<|im_start|>user", "𝄞 " * 5])
def test_there_and_back(server, text):
    body = server.post("/tokenize", {"model": "tiny", "prompt": text, "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) and body["max_model_len"] == 4096
    assert server.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": text}


def test_a_conversation_as_the_model_gets_it(server):
    messages = [{"role": "user", "content": "What is 12+34?"}]
    body = server.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json()
    assert body["token_strs"] is None
    chat = server.post(
        "/v1/chat/completions", {"messages": messages, "tools": [WEATHER], "return_token_ids": True, "max_tokens": 1}
    )
    assert chat.json()["prompt_token_ids"] == body["tokens"]
    text = server.post("/detokenize", {"tokens": body["tokens"]}).json()["prompt"]
    assert text.endswith("<|im_start|>assistant\n<think>\n") and "get_weather" in text
    off = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True}
    text = server.post("/detokenize", {"tokens": server.post("/tokenize", off).json()["tokens"]}).json()["prompt"]
    assert text.endswith("</think>\n\n")


def test_mistakes(server):
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"messages": [{"role": "system", "content": "a"}]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {}),
    ):
        assert server.post(path, body).status_code == 400, body
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert server.post("/tokenize", {"prompt": ""}).json()["count"] == 0


def test_tokenizer_info(server):
    info = server.http.get("/tokenizer_info").json()
    assert info["chat_template"] == (TINY / "chat_template.jinja").read_text() and info["tokenizer_class"]
