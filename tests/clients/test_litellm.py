"""LiteLLM, with its provider for vLLM servers."""

import json

import pytest

from tests.clients.programs import run_json
from tests.clients.tools import BOTH, BOTH_CALLS, LOOPS, RUN, TOOLS

WORDS = ["seven", "eight"]


@pytest.mark.slow
def test_litellm(server, tmp_path):
    given = {
        "tools": TOOLS,
        "loops": LOOPS,
        "both": BOTH,
        "results": {name: RUN[name](**arguments) for _, name, arguments, _ in LOOPS},
        "format": {"type": "json_schema", "json_schema": {"name": "word", "schema": {"enum": WORDS}}},
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    done = run_json("litellm_program.py", server.url, "given.json", folder=tmp_path)
    assert done["plain"] == done["text"] == "46"
    assert done["thought"] == done["stream"] == ["46", "2+4=6, 1+3=4"]
    assert done["usage"] == [18]
    assert done["loops"] == [[[[name, arguments]], answer] for _, name, arguments, answer in LOOPS]
    assert done["streamed_calls"] == [[[name, arguments]] for _, name, arguments, _ in LOOPS]
    assert done["both"] == [list(call) for call in BOTH_CALLS]
    assert json.loads(done["schema"]) in WORDS
    assert done["top"][:2] == [["4", 2], ["6", 2]]
    assert done["gathered"] == [str(n + 11) for n in range(20, 28)]
    assert "does not exist" in done["error"]
