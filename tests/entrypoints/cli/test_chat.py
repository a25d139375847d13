import io
import sys
import types

import pytest

from vllm.entrypoints.cli import main as cli
from vllm.sampling_params import SamplingParams


class FakeLLM:
    """Answers with what it was asked, after some reasoning."""

    made: list

    def __init__(self, **kwargs):
        self.kwargs, self.calls = kwargs, []
        FakeLLM.made.append(self)

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.6, top_k=20)

    def chat(self, messages, params, *, use_tqdm, chat_template_kwargs):
        asked = messages[-1]["content"]
        if asked == "interrupt":
            raise KeyboardInterrupt
        if asked == "too long":
            raise ValueError("the prompt is too long")
        self.calls.append(([dict(m) for m in messages], params, chat_template_kwargs))
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=f"hm</think>\n\nyou said {asked}")])]


@pytest.fixture
def chat(monkeypatch, capsys):
    FakeLLM.made = []
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.llm", types.SimpleNamespace(LLM=FakeLLM))

    def run(text, *words, tty=False):
        stdin = io.StringIO(text)
        stdin.isatty = lambda: tty
        monkeypatch.setattr(sys, "stdin", stdin)
        code = cli.main(["chat", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_piped_lines_are_turns_of_one_conversation(chat):
    code, out, _ = chat("hello\n\nagain\n", "--model", "preset:tiny", "--system", "be kind", "--max-tokens", "9")
    assert code == 0
    assert out == "hm</think>\n\nyou said hello\nhm</think>\n\nyou said again\n"
    (llm,) = FakeLLM.made
    assert llm.kwargs == {"model": "preset:tiny", "max_num_seqs": 1}
    messages, params, template = llm.calls[1]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "you said hello"  # without the reasoning
    assert (params.max_tokens, params.temperature, params.top_k) == (9, 0.6, 20)
    assert template == {}


def test_flags(chat):
    words = [
        "preset:tiny",
        "--temperature",
        "0",
        "--top-p",
        "0.5",
        "--no-thinking",
        "--dtype",
        "float32",
        "--max-num-seqs",
        "2",
    ]
    assert chat("x\n", *words)[0] == 0
    (llm,) = FakeLLM.made
    assert llm.kwargs == {"model": "preset:tiny", "dtype": "float32", "max_num_seqs": 2}
    _, params, template = llm.calls[0]
    assert (params.temperature, params.top_p) == (0.0, 0.5) and template == {"enable_thinking": False}


def test_commands(chat):
    chat("a\n/new\nb\n/exit\nc\n")
    assert [len(messages) for messages, _, _ in FakeLLM.made[0].calls] == [1, 1]


@pytest.mark.parametrize("tty", [False, True])
def test_interrupt_and_end_leave_cleanly(chat, tty):
    assert chat("interrupt\nb\n", tty=tty)[0] == 0
    assert FakeLLM.made[0].calls == []
    assert chat("", tty=tty)[0] == 0


def test_a_refused_prompt(chat):
    code, _, err = chat("too long\n")
    assert code == 2 and err == "error: the prompt is too long\n"
    code, out, err = chat("too long\nb\n", tty=True)
    assert code == 0 and "the prompt is too long (/new starts over)" in err and "you said b" in out
    assert len(FakeLLM.made[1].calls[0][0]) == 1
