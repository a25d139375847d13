"""One server for all tests that only ask it things."""

import pytest

from tests.entrypoints.openai.server import CHAT_FLAGS, TINY, RemoteServer


@pytest.fixture(scope="session")
def server():
    if not (TINY / "model.safetensors").is_file():
        pytest.fail("the bundled checkpoint is not there")
    with RemoteServer(*CHAT_FLAGS, "--enable-prompt-tokens-details", "--enable-tokenizer-info-endpoint") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    return server.openai()
