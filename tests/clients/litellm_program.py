"""Asks a server through LiteLLM and prints what came back as one JSON object. Usage: litellm_program.py URL FILE

FILE holds {"tools": [...], "loops": [[question, name, arguments, answer]], "both": question, "results": {name: text}}.
"""

import asyncio
import json
import sys

import litellm

litellm.suppress_debug_info = True
SUM = [{"role": "user", "content": "What is 12+34?"}]
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


def main(url, path):
    with open(path) as file:
        given = json.load(file)
    common = {
        "model": "hosted_vllm/tiny",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "temperature": 0,
        "num_retries": 0,
    }

    def ask(messages, **fields):
        return litellm.completion(messages=messages, **{**common, **fields})

    def message(messages, **fields):
        return ask(messages, **fields).choices[0].message

    thought = message(SUM)
    stream = list(ask(SUM, stream=True, stream_options={"include_usage": True}))
    together = litellm.stream_chunk_builder(stream).choices[0].message
    usage = [chunk.usage.completion_tokens for chunk in stream if getattr(chunk, "usage", None)]
    done = {
        "plain": message(SUM, **OFF).content,
        "thought": [thought.content, thought.reasoning_content],
        "stream": [together.content, together.reasoning_content],
        "usage": usage,
        "loops": [tool_loop(message, given, question) for question, *_ in given["loops"]],
        "both": calls(message([{"role": "user", "content": given["both"]}], tools=given["tools"], **OFF)),
        "streamed_calls": [streamed_calls(ask, given, question) for question, *_ in given["loops"]],
        "schema": message(SUM, response_format=given["format"], **OFF).content,
        "text": litellm.text_completion(**common, prompt="12+34=", stop="\n").choices[0].text,
        "top": logprobs(ask(SUM, logprobs=True, top_logprobs=2, **OFF)),
        "gathered": asyncio.run(gather(common)),
        "error": error(ask),
    }
    print(json.dumps(done))


def calls(message):
    return [[call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls or ()]


def tool_loop(message, given, question):
    """The calls that the model makes, and what it answers when they have run."""
    messages = [{"role": "user", "content": question}]
    asked = message(messages, tools=given["tools"], **OFF)
    messages.append(asked.model_dump())
    for call in asked.tool_calls:
        result = given["results"][call.function.name]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return [calls(asked), message(messages, tools=given["tools"], **OFF).content]


def streamed_calls(ask, given, question):
    chunks = list(ask([{"role": "user", "content": question}], tools=given["tools"], stream=True, **OFF))
    return calls(litellm.stream_chunk_builder(chunks).choices[0].message)


def logprobs(answer):
    return [[entry.token, len(entry.top_logprobs)] for entry in answer.choices[0].logprobs.content]


async def gather(common):
    async def one(n):
        messages = [{"role": "user", "content": f"What is {n}+11?"}]
        return (await litellm.acompletion(messages=messages, **{**common, **OFF})).choices[0].message.content

    return await asyncio.gather(*(one(n) for n in range(20, 28)))


def error(ask):
    try:
        ask(SUM, model="hosted_vllm/gpt-9")
    except litellm.NotFoundError as error:
        return str(error)


main(*sys.argv[1:])
