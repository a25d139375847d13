"""The servers that tests of this folder share."""

import pytest

from tests.entrypoints.openai.server import CHAT_FLAGS, TINY, RemoteServer

STUB = ("-m", "vllm.benchmarks.stub_server")


@pytest.fixture(scope="session", autouse=True)
def _checkpoint():
    if not (TINY / "model.safetensors").is_file():
        pytest.fail("the bundled checkpoint is not there")


@pytest.fixture(scope="module")
def large():
    """Room for many sequences, and a queue for the others."""
    with RemoteServer("--max-num-seqs", 128, "--kv-cache-memory-bytes", "256M") as server:
        yield server


@pytest.fixture(scope="session")
def small():
    """Short answers only, and few at once: whatever a request asks for is done soon."""
    limits = ("--max-model-len", 128, "--max-num-seqs", 16, "--max-num-queued-requests", 16)
    with RemoteServer(*CHAT_FLAGS, *limits, "--enable-tokenizer-info-endpoint") as server:
        yield server


@pytest.fixture(scope="module")
def stub():
    """No model: a token for each of up to 1,000 streams every two milliseconds, in a known order."""
    limits = ("--max-num-seqs", 1000, "--max-num-batched-tokens", 1000, "--max-num-queued-requests", 1000)
    with RemoteServer(*limits, command=(*STUB, "paced")) as server:
        yield server
