"""The scheduler's record of a sequence."""

import subprocess
import sys

import pytest

from vllm.sampling_params import SamplingParams
from vllm.v1.engine.messages import EngineCoreRequest
from vllm.v1.request import Request, RequestStatus


def make_request() -> Request:
    return Request.from_engine_core_request(EngineCoreRequest("a", [1, 2, 3], SamplingParams(), 5.0, priority=2))


def test_a_message_becomes_a_waiting_request() -> None:
    request = make_request()
    assert (request.request_id, request.prompt_token_ids, request.arrival_time, request.priority) == (
        "a",
        [1, 2, 3],
        5.0,
        2,
    )
    assert request.status is RequestStatus.WAITING
    assert request.finish_reason is None and not request.is_finished


def test_lengths_follow_the_tokens() -> None:
    request = make_request()
    assert (request.num_prompt_tokens, request.num_output_tokens, request.num_tokens) == (3, 0, 3)
    assert request.num_uncomputed_tokens == 3
    request.num_computed_tokens = 3
    assert request.num_uncomputed_tokens == 0
    request.output_token_ids.append(7)
    assert (request.num_output_tokens, request.num_tokens, request.num_uncomputed_tokens) == (1, 4, 1)
    assert request.all_token_ids == [1, 2, 3, 7]


def test_all_token_ids_is_a_list_of_its_own() -> None:
    request = make_request()
    request.all_token_ids.append(9)
    assert request.num_tokens == 3


@pytest.mark.parametrize("status", RequestStatus)
def test_finish_reasons_are_those_of_the_openai_api(status: RequestStatus) -> None:
    request = make_request()
    request.status = status
    expected = {
        RequestStatus.FINISHED_STOPPED: "stop",
        RequestStatus.FINISHED_LENGTH_CAPPED: "length",
        RequestStatus.FINISHED_ABORTED: "abort",
    }.get(status)
    assert request.finish_reason == expected
    assert request.is_finished == (expected is not None)


def test_requests_are_told_apart_by_identity() -> None:
    """Two requests may carry the same id, one after the other."""
    assert make_request() != make_request()


def test_the_host_side_needs_no_torch() -> None:
    code = "import sys, vllm.v1.core.sched.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
