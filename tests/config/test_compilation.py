"""When decode steps run as CUDA graphs, and what the performance modes change."""

import pytest

from vllm.config import CompilationConfig, SchedulerConfig
from vllm.config.scheduler import PERFORMANCE_MODES


@pytest.mark.parametrize(
    ("given", "decode", "prompt"),
    [
        ({}, True, True),
        ({"enforce_eager": True}, False, False),
        ({"optimization_level": 0}, False, False),
        ({"optimization_level": 3}, True, True),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, False, False),
        ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "mode": 0}}, True, False),
        ({"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}, True, True),
        ({"compilation_config": {"cudagraph_mode": "full"}}, True, True),
        ({"compilation_config": {"cudagraph_mode": "FULL"}, "enforce_eager": True}, False, False),
    ],
)
def test_graphs_or_not(given, decode, prompt):
    config = CompilationConfig(**given)
    assert (config.decode_graphs, config.prompt_graphs) == (decode, prompt)


def test_sizes():
    config = CompilationConfig(compilation_config={"cudagraph_capture_sizes": [4, 1], "max_cudagraph_capture_size": 64})
    assert config.capture_sizes == (4, 1) and config.max_capture_size == 64
    assert CompilationConfig().capture_sizes is None and CompilationConfig().max_capture_size is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cudagraph_mod": "NONE"}, "--compilation-config.cudagraph_mod: not known; the keys are mode"),
        ({"cudagraph_mode": "PIECEWISE"}, "must be one of NONE, FULL_DECODE_ONLY, FULL; got 'PIECEWISE'"),
        ({"mode": 3}, "--compilation-config.mode 3: the kernels are written by hand"),
        ({"cudagraph_capture_sizes": []}, "must be a list of whole numbers"),
        ({"cudagraph_capture_sizes": [0]}, "got [0]"),
        ({"cudagraph_capture_sizes": [True]}, "got [True]"),
        ({"max_cudagraph_capture_size": "8"}, "got '8'"),
    ],
)
def test_errors_say_what_is_known(given, words):
    with pytest.raises(ValueError) as caught:
        CompilationConfig(compilation_config=given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", PERFORMANCE_MODES)
def test_a_mode_fills_in_what_no_flag_says(mode):
    config = SchedulerConfig(performance_mode=mode, max_num_seqs=8).resolve("cpu")
    assert {name: getattr(config, name) for name in PERFORMANCE_MODES[mode]} == PERFORMANCE_MODES[mode]
    own = SchedulerConfig(performance_mode=mode, max_num_batched_tokens=999, stream_interval=7).resolve("cpu")
    assert (own.max_num_batched_tokens, own.stream_interval) == (999, 7)


def test_every_running_sequence_has_room_in_a_step():
    assert (
        SchedulerConfig(max_num_seqs=1024, performance_mode="interactivity").resolve("cpu").max_num_batched_tokens
        == 1024
    )


def test_steps_are_scheduled_ahead_on_a_gpu():
    assert SchedulerConfig().resolve("cuda").async_scheduling and not SchedulerConfig().resolve("cpu").async_scheduling
    assert SchedulerConfig(async_scheduling=True).resolve("cpu").async_scheduling
