"""Tools that tests offer to the model and run for it."""

import json

from vllm.benchmarks.tiny_tasks import Item

STOCK = {"lemon": 42, "apple": 7}


def get_price(item: str) -> str:
    """What something costs."""
    return str(STOCK[item])


def set_timer(count: int, label: str) -> str:
    """Set a timer."""
    return f"{label} {count}"


def schema(name: str, **parameters: str) -> dict:
    """A tool as requests describe it; all its parameters are required."""
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    function = {
        "name": name,
        "parameters": {"type": "object", "properties": properties, "required": list(properties)},
    }
    return {"type": "function", "function": function}


RUN = {"get_price": get_price, "set_timer": set_timer}
TOOLS = [schema("get_price", item="string"), schema("set_timer", count="integer", label="string")]
# What to ask, the call that it takes, and the answer once the tool has run.
LOOPS = [
    ('Call "get_price" with item "lemon".', "get_price", {"item": "lemon"}, "The result is 42."),
    (
        'Use "set_timer" with count 15 and label "bread".',
        "set_timer",
        {"count": 15, "label": "bread"},
        "The result is bread 15.",
    ),
]
BOTH = 'Call "get_price" with item "apple", then "set_timer" with count 3 and label "rice".'
BOTH_CALLS = [("get_price", {"item": "apple"}), ("set_timer", {"count": 3, "label": "rice"})]


def called(calls) -> list[dict]:
    """Calls of an SDK's message, in the form of tiny_tasks."""
    return [{"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in calls or ()]


def history(item: Item) -> list[dict]:
    """The messages of an item, with arguments as text, which is how the API has them."""
    messages = json.loads(json.dumps(item.messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return messages
