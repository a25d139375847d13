"""`vllm chat`: a conversation in the terminal with a model in this process.

Lines that are piped in are answered one after the other, as turns of one conversation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from typing import Any

from vllm.engine.arg_utils import EngineArgs

_HELP = "An empty line is passed over, /new forgets the conversation, Ctrl-D or /exit leaves."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The engine's flags, and this command's own."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    chat = parser.add_argument_group("chat")
    chat.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    chat.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="longest answer in tokens [2048]")
    chat.add_argument(
        "--temperature", type=float, metavar="X", help="0 always takes the likeliest token; default: the model's"
    )
    chat.add_argument("--top-p", type=float, metavar="X", help="default: the model's")
    chat.add_argument("--top-k", type=int, metavar="N", help="default: the model's")
    chat.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="let the model reason before it answers; default: what its chat template does",
    )
    EngineArgs.add_cli_args(parser)
    # One person talks to one model: a small card should not hold state for 256 conversations.
    parser.set_defaults(max_num_seqs=1)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends. Ctrl-C and Ctrl-D leave without a traceback."""
    from vllm.entrypoints.llm import LLM  # seconds of imports, so only once the flags are known to be right

    llm = LLM(**_given(EngineArgs.from_cli_args(args)))
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
        print(_HELP, file=sys.stderr)
    try:
        _converse(llm, args, interactive)
    except KeyboardInterrupt:
        if interactive:
            print()
    return 0


def _converse(llm: Any, args: argparse.Namespace, interactive: bool) -> None:
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        if line == "/exit":
            return
        if line == "/new":
            messages = list(opening)
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        try:
            text = _answer(llm, messages, args)
        except ValueError as error:  # a conversation that has outgrown the context, say
            if not interactive:
                raise
            messages.pop()
            print(f"error: {error} (/new starts over)", file=sys.stderr)
            continue
        print(text.strip(), flush=True)
        # The template drops the reasoning of earlier turns, and so does this.
        messages.append({"role": "assistant", "content": text.rpartition("</think>")[2].strip()})


def _answer(llm: Any, messages: list[dict[str, str]], args: argparse.Namespace) -> str:
    params = llm.get_default_sampling_params()
    changes = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    params = params.clone(**{name: value for name, value in changes.items() if value is not None})
    thinking = {} if args.thinking is None else {"enable_thinking": args.thinking}
    (output,) = llm.chat(messages, params, use_tqdm=False, chat_template_kwargs=thinking)
    return output.outputs[0].text


def _given(engine: EngineArgs) -> dict[str, Any]:
    """The arguments that differ from their defaults, and the model."""
    default = EngineArgs()
    values = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)}
    return {name: value for name, value in values.items() if name == "model" or value != getattr(default, name)}
