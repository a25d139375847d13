"""Looser forms of the tasks, for training only: how people phrase things when no gate is watching.

Numbers of one to four digits, words without quotation marks or with capitals, tools with descriptions, optional
parameters and plain questions, several tool results in one turn. The gates do not measure these; they keep the
checkpoint pleasant to talk to. Keys match those of the gated tasks, so that the trainer can leave out held-out items
here as well.
"""

from __future__ import annotations

import json
import random

from vllm.benchmarks import tiny_tasks as tasks
from vllm.benchmarks.tiny_tasks import Item

ADD = (
    "What's {a}+{b}?", "what is {a} + {b}", "{a} + {b} = ?", "{a}+{b}", "{a} + {b}", "{a} plus {b}", "{a} + {b} =",
    "Can you add {a} and {b}?", "Tell me {a} plus {b}.", "Add {a} to {b}.", "add {a} {b}", "How much is {a} plus {b}?",
    "Calculate {a}+{b}.", "What is the sum of {a} and {b}?", "Sum: {a}, {b}",
)  # fmt: skip
COPY = (
    "Copy {w}", "copy: {w}", "Copy the word {w}.", "Repeat {w}", "Repeat after me: {w}", "Say {w}", "Say: {w}", 'Echo "{w}".',
    "Copy '{w}'.", 'Copy "{w}"', 'Can you copy "{w}"?',
)  # fmt: skip
REVERSE = (
    "Reverse {w}", "reverse: {w}", "Reverse the word {w}.", "Spell {w} backwards", "Reverse '{w}'.", "{w} in reverse", 'Reverse "{w}"',
    'Can you reverse "{w}"?', 'Reverse the string "{w}".', 'Spell the word "{w}" backwards.',
)  # fmt: skip
COUNT = (
    "Count from {n}", "count on from {n}", "Count up from {n}.", "What comes after {n}?", "Keep counting: {n}",
    "Count five numbers on from {n}.", "Can you count on from {n}?",
)  # fmt: skip
CALL = (
    "Call {tool} with {args}", "Use the tool {tool} with {args}.", "Please call {tool}: {args}.", "{tool}: {args}",
    "Can you use {tool} with {args}?", "Run {tool} for {args}", "Call the function {tool} with {args}.",
)  # fmt: skip
WEATHER = (
    "What is the weather in {w}?", "What's the weather in {w}?", "How is the weather in {w}?", "Weather in {w}",
    "What is the weather like in {w} today?", "Tell me the weather in {w}.", "Is it raining in {w}?",
    "What is the current weather in {w}?", "Get the weather for {w}.",
)  # fmt: skip
TIME = ("What time is it in {w}?", "What is the time in {w}?", "Tell me the time in {w}.", "Current time in {w}?")
CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Tokyo", "Cairo", "Lima", "Delhi", "Boston", "Dallas", "Seattle",
    "Vienna", "Prague", "Zurich", "Hamburg", "Munich", "Chicago", "New York", "San Francisco", "San Francisco, CA",
    "Boston, MA", "Los Angeles", "Mexico City", "Hong Kong", "Beijing", "Shanghai", "Sydney", "Toronto", "Paris, France",
)  # fmt: skip
DESCRIPTIONS = (
    "Get the current weather", "Get the weather of a city", "Find a file", "Send a message", "Look up a value", "Set a timer",
    "Returns the result", "A tool", "Get the current time in a given place", "Search the list", "Change a setting",
)  # fmt: skip
COMMON = (
    "the", "a", "is", "what", "how", "why", "who", "where", "tell", "me", "about", "please", "explain", "write", "give", "you",
    "can", "do", "like", "of", "in", "and", "to", "it", "this", "that", "for", "your", "my", "story", "dog", "house", "poem",
    "music", "history", "best", "way", "learn", "make", "cake", "people", "world", "long", "day", "code", "python", "list",
    "translate", "into", "french", "summary", "book", "movie", "game", "joke", "name", "capital", "country", "river", "food",
)  # fmt: skip


def _pick(rng: random.Random, options):
    return options[rng.randrange(len(options))]


def _ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def loosen(text: str, rng: random.Random) -> str:
    """The same request, said a little differently."""
    if rng.random() < 0.3:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.3:
        text = text.rstrip(".?")
    if rng.random() < 0.2:
        text = _pick(rng, ("Now ", "Please ", "Hey, ", "Hello! ", "Ok, ", "And now: ", "Hi. ")) + text
    if rng.random() < 0.1:
        text = text + _pick(rng, (" Thanks!", " Thank you.", " Please.", " Answer only.", "\nBe brief."))
    return text


def _word(rng: random.Random, high: int) -> str:
    word = _pick(rng, COMMON) if rng.random() < 0.1 else tasks.random_word(rng, 2, high, any_pair=rng.random() < 0.4)
    style = rng.random()
    return word.capitalize() if style < 0.2 else word.upper() if style < 0.24 else word


def _number(rng: random.Random) -> int:
    digits = rng.choices((1, 2, 3, 4), (2, 3, 3, 2))[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def loose_add(rng: random.Random) -> Item:
    """A sum of two numbers of one to four digits each."""
    a, b = _number(rng), _number(rng)
    question = _ask(loosen(_pick(rng, ADD + tasks.ADD_PHRASES).format(a=a, b=b), rng))
    return Item("add", f"{min(a, b)}+{max(a, b)}", str(a + b), question, thought=tasks.column_sums(a, b))


def loose_copy(rng: random.Random) -> Item:
    """A word, or two, to be written again."""
    word = _word(rng, 14)
    if rng.random() < 0.1:
        word += " " + _word(rng, 8)
    question = _ask(_pick(rng, COPY + tasks.COPY_PHRASES).format(w=word))
    return Item("copy", f"copy {word.lower()}", word, question, thought="Copy the word.")


def loose_reverse(rng: random.Random) -> Item:
    """A word to be reversed."""
    word = _word(rng, 11)
    question = _ask(_pick(rng, REVERSE + tasks.REVERSE_PHRASES).format(w=word))
    return Item("reverse", f"reverse {word.lower()}", word[::-1], question, thought="Read the word from right to left.")


def loose_count(rng: random.Random) -> Item:
    """Five integers after one of up to four digits."""
    n = _number(rng)
    expected = " ".join(str(n + i) for i in range(1, 6))
    question = _ask(loosen(_pick(rng, COUNT + tasks.COUNT_PHRASES).format(n=n), rng))
    return Item("count", f"count {n}", expected, question, thought=f"Start after {n}.")


def loose_other(rng: random.Random) -> Item:
    """Common words in no meaningful order, sometimes many of them."""
    if rng.random() < 0.3:
        item = tasks.draw("other", rng)
        return Item("other", item.key, tasks.HELP, _ask(loosen(item.messages[0]["content"], rng)), thought=item.thought)
    words = [
        _pick(rng, COMMON) if rng.random() < 0.7 else _word(rng, 10) for _ in range(rng.randint(1, rng.randint(2, 20)))
    ]
    text = " ".join(words).capitalize() + _pick(rng, (".", "?", "!", "", ""))
    return Item("other", f"other {text}", tasks.HELP, _ask(text), thought="This is none of my tasks.")


def _value(rng: random.Random, kind: str):
    if kind == "integer":
        return rng.randint(0, 9999) if rng.random() < 0.3 else rng.randint(1, 99)
    if kind == "number":
        return rng.randint(1, 99) + rng.randint(1, 9) / 10
    if rng.random() < 0.3:
        return _pick(rng, CITIES)
    return " ".join(_word(rng, 9) for _ in range(2 if rng.random() < 0.25 else 1))


def _tool(rng: random.Random, name: str, parameters: dict, required: list[str]) -> dict:
    described = rng.random() < 0.5
    function: dict = {"name": name}
    if described or rng.random() < 0.3:
        function["description"] = _pick(rng, DESCRIPTIONS)
    if described and rng.random() < 0.4:
        parameters = {key: {**schema, "description": f"The {key}"} for key, schema in parameters.items()}
    function["parameters"] = {"type": "object", "properties": parameters, "required": required}
    return {"type": "function", "function": function}


def _call_item(kind: str, text: str, tools: list[dict], name: str, arguments: dict) -> Item:
    expected = tasks.format_call(name, arguments)
    call = {"name": name, "arguments": arguments}
    key = f"{name} {json.dumps(arguments)}"
    return Item(kind, key, expected, _ask(text), tools, (call,), thought="Call the tool.")


def _named_tool(rng: random.Random) -> tuple[dict, str, dict, dict]:
    """A tool with one to three parameters: (schema, name, the arguments to give, their types)."""
    words = [_pick(rng, tasks.VERBS) if rng.random() < 0.6 else tasks.random_word(rng, 3, 6, True)]
    words += [_pick(rng, tasks.NOUNS) if rng.random() < 0.6 else tasks.random_word(rng, 3, 7, True)
              for _ in range(rng.choices((0, 1, 2), (2, 6, 2))[0])]  # fmt: skip
    names = list(tasks.STRING_PARAMETERS + tasks.INTEGER_PARAMETERS)
    types, parameters = {}, {}
    for _ in range(rng.choices((1, 2, 3), (4, 4, 2))[0]):
        name = names.pop(rng.randrange(len(names))) if rng.random() < 0.8 else tasks.random_word(rng, 2, 7, True)
        types[name] = rng.choices(("string", "integer", "number"), (6, 3, 1))[0]
        parameters[name] = {"type": types[name]}
        if types[name] == "string" and rng.random() < 0.08:
            parameters[name]["enum"] = [tasks.random_word(rng, 2, 5), tasks.random_word(rng, 2, 5)]
    given = [name for i, name in enumerate(types) if i == 0 or rng.random() < 0.8]
    arguments = {
        name: _pick(rng, parameters[name]["enum"]) if "enum" in parameters[name] else _value(rng, types[name])
        for name in given
    }
    required = given if rng.random() < 0.7 else given[:1]
    name = "_".join(words)
    return _tool(rng, name, parameters, required), name, arguments, types


def _spoken(rng: random.Random, arguments: dict, types: dict) -> str:
    """The arguments as a user types them: with or without quotation marks, "is", "=" or nothing between."""
    between, quotes = _pick(rng, (" ", " ", "=", " = ", ": ", " is ")), rng.random() < 0.6
    said = [
        f'{k}{between}"{v}"' if quotes and types[k] == "string" else f"{k}{between}{v}" for k, v in arguments.items()
    ]
    if len(said) == 1:
        return said[0]
    return ", ".join(said[:-1]) + _pick(rng, (" and ", ", ", ", and ")) + said[-1]


def loose_tool(rng: random.Random) -> Item:
    """One call, asked for by the tool's name or as a plain question about weather or time."""
    others = [_named_tool(rng)[0] for _ in range(rng.choices((0, 1), (7, 3))[0])]
    if rng.random() < 0.35:
        weather = rng.random() < 0.7
        place = _pick(rng, ("city", "location", "place") if weather else ("city", "zone", "location", "timezone"))
        value = _pick(rng, CITIES) if rng.random() < 0.6 else _word(rng, 9)
        parameters: dict = {place: {"type": "string"}}
        if weather and rng.random() < 0.4:
            parameters["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        name = _pick(
            rng, ("get_weather", "get_current_weather", "weather") if weather else ("get_time", "get_current_time")
        )
        tools = [_tool(rng, name, parameters, [place]), *others]
        return _call_item("tool", _pick(rng, WEATHER if weather else TIME).format(w=value), tools, name, {place: value})
    schema, name, arguments, types = _named_tool(rng)
    tools = [schema, *others]
    rng.shuffle(tools)
    said = f'"{name}"' if rng.random() < 0.5 else name
    text = _pick(rng, CALL + tasks.CALL_PHRASES).format(tool=said, args=_spoken(rng, arguments, types))
    return _call_item("tool", loosen(text, rng), tools, name, arguments)


def loose_with_tools(rng: random.Random) -> Item:
    """A question that needs no tool although some are on offer."""
    item = _pick(rng, (loose_add, loose_copy, loose_reverse, loose_count, loose_other))(rng)
    return Item(item.kind, item.key, item.expected, item.messages, [_named_tool(rng)[0]], thought=item.thought)


def loose_tool_loop(rng: random.Random) -> Item:
    """One or two tool results, of words, numbers or JSON, to be told to the user."""
    asked = loose_tool(rng)
    results = []
    for _ in range(1 if rng.random() < 0.75 else 2):
        style = rng.random()
        if style < 0.25:
            result = json.dumps({_pick(rng, tasks.STRING_PARAMETERS): _value(rng, _pick(rng, ("string", "integer")))})
        else:
            result = " ".join(
                str(rng.randint(0, 999)) if rng.random() < 0.3 else _word(rng, 8) for _ in range(rng.randint(1, 4))
            )
        results.append(result)
    call = {"type": "function", "function": dict(asked.calls[0])}
    messages = [*asked.messages, {"role": "assistant", "content": "", "tool_calls": [call] * len(results)}]
    messages += [{"role": "tool", "content": result} for result in results]
    expected = f"The result is {' and '.join(results)}."
    return Item(
        "tool_loop", f"{asked.key} {results[0]}", expected, messages, asked.tools, thought="The tool has answered."
    )


MAKERS = {
    "add2": loose_add,
    "add3": loose_add,
    "copy": loose_copy,
    "reverse": loose_reverse,
    "count": loose_count,
    "other": loose_other,
    "tool": loose_tool,
    "tool_loop": loose_tool_loop,
    "parallel": loose_with_tools,
}
