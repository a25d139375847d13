"""/v1/completions on the bundled checkpoint, whole and streamed, through plain HTTP."""

import pytest

PATH = "/v1/completions"
SUM = "12+34="


def token_ids(server, text):
    return server.post("/tokenize", {"prompt": text}).json()["tokens"]


def joined(events):
    choices = {}
    for chunk in events:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "logprobs": None, "token_ids": []})
            choice["text"] += part["text"]
            choice["token_ids"] += part.get("token_ids") or []
            if part["logprobs"]:
                before = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                choice["logprobs"] = {name: before[name] + part["logprobs"][name] for name in before}
            assert choice.get("finish_reason") is None, "something comes after the end"
            choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
    return choices


def test_an_answer(server):
    body = server.complete(SUM, stop="\n")
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice == {"index": 0, "text": "46", "logprobs": None, "finish_reason": "stop", "stop_reason": "\n"}
    prompt_tokens = len(token_ids(server, SUM))
    assert body["usage"]["prompt_tokens"] == prompt_tokens
    assert body["usage"]["total_tokens"] == prompt_tokens + body["usage"]["completion_tokens"]


def test_every_form_of_prompt(server):
    ids = token_ids(server, SUM)
    assert server.complete(ids, stop="\n")["choices"][0]["text"] == "46"
    for prompts in ([SUM, "20+22="], [ids, token_ids(server, "20+22=")]):
        body = server.complete(prompts, stop="\n")
        assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "46"), (1, "42")]
        assert body["usage"]["prompt_tokens"] == len(ids) + len(token_ids(server, "20+22="))


def test_defaults(server):
    assert server.complete("The", ignore_eos=True)["usage"]["completion_tokens"] == 16
    long = server.complete(SUM, max_tokens=None, min_tokens=20, stop="4", seed=None)["choices"][0]
    assert len(long["text"]) >= 19 and long["stop_reason"] == "4"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": [SUM, "20+22=", "Hello"], "max_tokens": 5},
        {"n": 2, "temperature": 1.0, "seed": 3, "prompt": ["a", "b"], "max_tokens": 6, "logprobs": 2},
        {"logprobs": 2, "stop": "\n"},
        {"echo": True, "max_tokens": 4},
        {"echo": True, "logprobs": 1, "max_tokens": 4, "return_token_ids": True},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "logprobs": 0, "n": 2, "temperature": 1.0, "seed": 5, "prompt": [SUM, "Hé ✓"], "max_tokens": 3},
        {"best_of": 1, "suffix": None, "user": "me"},
    ],
)
def test_a_stream_equals_the_whole_answer(server, fields):
    body = {"prompt": SUM, "temperature": 0, **fields}
    done = server.post(PATH, body)
    assert done.status_code == 200, done.text
    whole = done.json()
    events = server.stream(PATH, {**body, "stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    streamed = joined(events)
    assert len(streamed) == len(whole["choices"])
    for choice in whole["choices"]:
        other = streamed[choice["index"]]
        for name in ("text", "finish_reason", "stop_reason"):
            assert other[name] == choice[name]
        if choice["logprobs"] is None:
            assert other["logprobs"] is None
        else:
            for name in ("tokens", "text_offset"):
                assert other["logprobs"][name] == choice["logprobs"][name]
            for mine, theirs in zip(other["logprobs"]["token_logprobs"], choice["logprobs"]["token_logprobs"]):
                assert mine == theirs or mine == pytest.approx(theirs, abs=1e-3)


def test_echo_scores_the_prompt(server):
    """The request with which lm-eval scores an answer."""
    ids = token_ids(server, "12+34=46")
    for max_tokens in (0, 1):
        body = server.complete(ids, echo=True, logprobs=1, max_tokens=max_tokens)
        (choice,) = body["choices"]
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(ids) + max_tokens}
        assert logprobs["tokens"][: len(ids)] == list("12+34=46") and logprobs["text_offset"][:3] == [0, 1, 2]
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        answer = logprobs["token_logprobs"][len(ids) - 2 : len(ids)]
        assert all(value > -0.5 for value in answer), "the right sum is likely"
        assert max(logprobs["top_logprobs"][-2 - max_tokens], key=logprobs["top_logprobs"][-2 - max_tokens].get) == "4"
        assert choice["text"].startswith("12+34=46") and choice["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == max_tokens
    assert server.complete(SUM, echo=True, max_tokens=0)["choices"][0]["text"] == SUM
    wrong = server.complete("12+34=71", echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]["token_logprobs"]
    assert sum(wrong[-2:]) < sum(answer) - 3


def test_logprobs_name_places_in_the_text(server):
    (choice,) = server.complete("Hé ✓ 12+34=", echo=True, logprobs=2, max_tokens=6)["choices"]
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        if "\ufffd" not in token and not token.startswith("<|"):
            assert choice["text"][offset : offset + len(token)] == token
    for token, value, top in zip(logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:]):
        assert (top[token] == value and 2 <= len(top) <= 3) or "\ufffd" in token


def test_prompt_logprobs(server):
    (choice,) = server.complete(SUM, prompt_logprobs=2, max_tokens=1)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and len(rest) == len(SUM) - 1
    assert all(2 <= len(position) <= 3 for position in rest)


def test_token_ids(server):
    (choice,) = server.complete(SUM, return_token_ids=True, stop="\n")["choices"]
    assert choice["prompt_token_ids"] == token_ids(server, SUM)
    assert server.post("/detokenize", {"tokens": choice["token_ids"]}).json()["prompt"].startswith("46")


def test_n(server):
    body = server.complete("Once", n=4, temperature=1.5, seed=1, ignore_eos=True, max_tokens=8)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in body["choices"]}) > 1
    assert body["usage"]["completion_tokens"] == 32


def test_a_token_without_text_is_streamed(server):
    """Such as one that the tokenizer does not know: its reader sees when it came."""
    (special,) = token_ids(server, "<|im_start|>")
    only = {"allowed_token_ids": [special], "ignore_eos": True, "max_tokens": 3, "temperature": 0}
    events = server.stream(PATH, {"prompt": SUM, **only})
    chunks = [choice for chunk in events for choice in chunk["choices"]]
    assert [(chunk["text"], chunk["finish_reason"]) for chunk in chunks] == [("", None), ("", None), ("", "length")]


def test_many_prompts_in_one_stream(server):
    prompts = [f"{n}+{n}=" for n in range(10, 34)]
    events = server.stream(PATH, {"prompt": prompts, "temperature": 0, "stop": "\n", "max_tokens": 4})
    assert [joined(events)[i]["text"] for i in range(len(prompts))] == [str(n + n) for n in range(10, 34)]
