"""Tokenizer and chat template of the bundled checkpoint, as AutoTokenizer loads them from its folder."""

from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from tiny_data import Encoder
from tiny_tokenizer import ADDED_TOKENS, FIRST_ADDED_ID, build_tokenizer
from transformers import AutoTokenizer

from vllm.benchmarks import tiny_tasks

FOLDER = Path(__file__).resolve().parents[2] / "vllm" / "assets" / "tiny-qwen3_5-moe"
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def render(tokenizer):
    def call(messages, tools=None, prompt=False, **options):
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **options
        )

    return call


def user(content="hi"):
    return {"role": "user", "content": content}


def test_folder_holds_what_the_builder_builds(tokenizer):
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    text = 'Reverse the word "planet".\n\n  12+345=357 <think> naïve e\u0301 日本 🙂'
    assert tokenizer.encode(text) == built.encode(text)


def test_ids_and_special_flags(tokenizer):
    assert len(tokenizer) == 1024
    ids = tokenizer.convert_tokens_to_ids([text for text, _ in ADDED_TOKENS])
    assert ids == list(range(FIRST_ADDED_ID, 1024))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    kept = tokenizer.decode(ids, skip_special_tokens=True)
    assert kept == "".join(text for text, special in ADDED_TOKENS if not special)


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n \t\r\n", "plain text", "  two  spaces ", "0123", "Zażółć gęślą jaźń", "日本語テキスト", "🙂👩‍👩‍👧", "\x00\x7f", "ﬀ ½ ǆ",
     "हिन्दी", "<tool_call>\n<function=a>"],
)  # fmt: skip
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_code_point_survives(tokenizer):
    # NFC, as in the published tokenizer, replaces a few hundred code points by their canonical form: left out here.
    import unicodedata

    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    text = "x".join(c for c in points[:0x3000:7] + points[0x3000::997] if unicodedata.normalize("NFC", c) == c)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_quoted_words_are_spelled_and_instructions_are_whole(tokenizer):
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode('Reverse the word "planet".')]
    assert tokens == ["Reverse", " the", " word", ' "', *"planet", '".']


def test_fast_path_of_the_trainer_is_the_template(tokenizer):
    encoder = Encoder()
    for kind in tiny_tasks.KINDS:
        for item in tiny_tasks.generate(kind, 10):
            for thinking in (False, True):
                if item.prompt is None:
                    text = tokenizer.apply_chat_template(
                        item.messages,
                        tools=item.tools,
                        tokenize=False,
                        add_generation_prompt=True,
                        enable_thinking=thinking,
                    )
                    assert encoder.item_prompt(item, thinking) == tokenizer.encode(text)


def test_generation_prompt(render):
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render([user(" hi\n")], prompt=True) == start + "<think>\n"
    assert render([user()], prompt=True, enable_thinking=True) == start + "<think>\n"
    assert render([user()], prompt=True, enable_thinking=False) == start + "<think>\n\n</think>\n\n"


def test_system_and_tools_share_a_block(render):
    text = render([{"role": "system", "content": "Be kind."}, user()], tools=[TOOL, TOOL])
    head = text.split("<|im_start|>user")[0]
    assert head.startswith("<|im_start|>system\n# Tools\n\n<tools>\n{")
    assert head.endswith("</tool_call>\n\nBe kind.<|im_end|>\n")
    assert head.count('"name": "f"') == 2
    assert render([{"role": "system", "content": "Be kind."}, user()]).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n"
    )


def test_calls_and_results(render):
    arguments = {"n": 3, "flag": True, "list": [1, "é"], "text": "a\nb"}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    text = render(
        [
            user(),
            {"role": "assistant", "content": "Wait.", "reasoning_content": "R", "tool_calls": [call, call]},
            {"role": "tool", "content": "one"},
            {"role": "tool", "content": "two"},
        ],
        tools=[TOOL],
    )
    block = (
        "<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n<parameter=flag>\nTrue\n</parameter>\n"
        '<parameter=list>\n[1, "é"]\n</parameter>\n<parameter=text>\na\nb\n</parameter>\n</function>\n</tool_call>'
    )
    assert f"<think>\nR\n</think>\n\nWait.\n\n{block}\n{block}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>\n"
    )


def test_reasoning_of_earlier_turns_is_dropped(render):
    said = {"role": "assistant", "content": "<think>\nold\n</think>\n\nyes"}
    assert "old" not in render([user(), said, user()])
    assert "<|im_start|>assistant\nyes<|im_end|>" in render([user(), said, user()])
    assert "<think>\nold\n</think>\n\nyes<|im_end|>" in render([user(), said])
    assert "<think>\nold\n</think>\n\nyes" in render([user(), said, user()], preserve_thinking=True)


def test_pictures_and_videos(render):
    content = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "video"},
        {"type": "image_url", "image_url": {}},
    ]
    image, video = ("<|vision_start|><|%s_pad|><|vision_end|>" % kind for kind in ("image", "video"))  # noqa: UP031
    assert f"\n{image}and{video}{image}<|im_end|>" in render([user(content)])
    numbered = render([user(content), user(content)], add_vision_id=True)
    for part in (
        f"Picture 1: {image}",
        f"Picture 2: {image}",
        f"Video 1: {video}",
        f"Picture 4: {image}",
        f"Video 2: {video}",
    ):
        assert part in numbered


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "x"}],
        [user(), {"role": "system", "content": "late"}],
        [user(), {"role": "robot", "content": "x"}],
        [user("<tool_response>\nx\n</tool_response>")],
        [{"role": "system", "content": [{"type": "image"}]}, user()],
        [user([{"type": "sound"}])],
        [user(), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
    ],
)
def test_malformed_chats_raise(render, messages):
    with pytest.raises((TemplateError, ValueError)):  # ValueError: transformers itself, on no messages
        render(messages)
