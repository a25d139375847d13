"""The offline API as a user meets it: right answers, and one clear line for what cannot be."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from vllm import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(model=str(tiny_model), max_model_len=256, max_num_seqs=8, use_tqdm_on_load=False)


def test_chat_answers(llm):
    answers = llm.chat(
        [[{"role": "user", "content": "What is 12+34?"}], [{"role": "user", "content": 'Reverse the word "stone".'}]],
        SamplingParams(temperature=0, max_tokens=20),
        chat_template_kwargs={"enable_thinking": False},
        use_tqdm=False,
    )
    assert [a.outputs[0].text for a in answers] == ["46", "enots"]
    assert all(a.finished and a.outputs[0].finish_reason == "stop" for a in answers)


def test_thinking_comes_before_the_answer(llm):
    [answer] = llm.chat(
        [{"role": "user", "content": "What is 12+34?"}], SamplingParams(temperature=0, max_tokens=60), use_tqdm=False
    )
    thought, _, text = answer.outputs[0].text.partition("</think>")
    assert thought.strip() and text.strip() == "46"


@pytest.mark.parametrize("prompt", ["12+34=", {"prompt": "12+34="}])
def test_a_prompt_may_be_text_or_a_dict(llm, prompt):
    [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert output.outputs[0].text.startswith("46")


def test_token_ids_are_prompts_too(llm):
    ids = llm.get_tokenizer().encode("12+34=")
    for form in (ids, [ids], {"prompt_token_ids": ids}, [{"prompt_token_ids": ids}]):
        [output] = llm.generate(form, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        assert output.prompt_token_ids == ids and output.outputs[0].text.startswith("46")


def test_a_profile_and_an_empty_cache(llm, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert llm.reset_prefix_cache() is True
    with pytest.raises(ValueError, match="start one first"):
        llm.stop_profile()
    llm.start_profile()
    with pytest.raises(ValueError, match="already"):
        llm.start_profile()
    llm.generate("12+34=", SamplingParams(max_tokens=2), use_tqdm=False)
    path = llm.stop_profile()
    assert path.startswith(str(tmp_path / "profiles")) and b"aten::" in gzip.decompress(Path(path).read_bytes())


def test_metrics(llm):
    before = {metric.name: metric for metric in llm.get_metrics()}
    llm.generate(["12+34=", "1"], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    after = {metric.name: metric for metric in llm.get_metrics()}
    name = "vllm:generation_tokens"
    assert after[name].value - before[name].value == 6 and after["vllm:num_requests_running"].value == 0
    name = "vllm:e2e_request_latency_seconds"
    assert after[name].count - before[name].count == 2 and "vllm:spec_decode_num_drafts" in after


def test_progress_bars_can_be_turned_off(tiny_model, capfd):
    quiet = LLM(model=str(tiny_model), max_model_len=64, max_num_seqs=2, use_tqdm_on_load=False)
    quiet.generate("1", SamplingParams(max_tokens=1), use_tqdm=False)
    assert "%|" not in capfd.readouterr().err
    loud = LLM(model=str(tiny_model), max_model_len=64, max_num_seqs=2)
    loud.generate("1", SamplingParams(max_tokens=1))
    assert capfd.readouterr().err.count("100%|") >= 2


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "at least one token"),
        ({"prompt_token_ids": []}, "at least one token"),
        ({"prompt_token_ids": [5, 99999]}, "99999"),
        ({"prompt_token_ids": [-1]}, "-1"),
        ([7] * 400, "256"),
        ({"text": "x"}, "prompt"),
        ({"prompt_token_ids": ["a"]}, "prompt_token_ids"),
    ],
)
def test_impossible_prompts_are_refused_and_the_engine_goes_on(llm, prompt, words):
    with pytest.raises(ValueError, match=words) as error:
        llm.generate(["12+34=", prompt], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    assert "\n" not in str(error.value)
    assert not llm.llm_engine.has_unfinished_requests
    assert not llm.llm_engine.core.has_unfinished_requests
    [output] = llm.generate("12+34=", SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    assert output.outputs[0].text.startswith("46")


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"logit_bias": {99999: 1.0}}, "99999"),
        ({"allowed_token_ids": [99999]}, "99999"),
        ({"stop_token_ids": [99999]}, "99999"),
        ({"logprobs": 500}, "logprobs"),
        ({"prompt_logprobs": 500}, "logprobs"),
    ],
)
def test_parameters_outside_the_model_are_refused(llm, params, words):
    with pytest.raises(ValueError, match=words):
        llm.generate("1", SamplingParams(**params), use_tqdm=False)
    assert not llm.llm_engine.core.has_unfinished_requests


def test_unequal_lists_are_refused(llm):
    with pytest.raises(ValueError, match="2 given for 1"):
        llm.generate(["a"], [SamplingParams(), SamplingParams()], use_tqdm=False)


def test_an_interrupt_leaves_nothing_behind(llm, monkeypatch):
    steps = iter([True, False])
    step = llm.llm_engine.step

    def interrupted():
        if not next(steps):
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=50), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests
    llm.llm_engine.core.scheduler.assert_balanced()


# Models that cannot be loaded.


@pytest.fixture
def copy(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


def refused(model, **args) -> str:
    with pytest.raises((ValueError, FileNotFoundError, TypeError)) as error:
        LLM(model=str(model), **{"max_model_len": 64, "max_num_seqs": 2, "use_tqdm_on_load": False} | args)
    message = str(error.value)
    assert "\n" not in message, "one line"
    return message


def test_unknown_path(tmp_path):
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")


def test_unknown_preset():
    assert "qwen3.5-9b" in refused("preset:qwen3.5-10b")


def test_folder_without_config(tmp_path):
    assert "config.json" in refused(tmp_path)


def test_config_that_is_not_json(copy):
    (copy / "config.json").write_text("{")
    assert "config.json" in refused(copy)


def test_another_architecture(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    message = refused(copy)
    assert "LlamaForCausalLM" in message and "Qwen3NextForCausalLM" in message


def test_truncated_weights(copy):
    [shard] = copy.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in refused(copy)


def test_corrupt_header(copy):
    [shard] = copy.glob("*.safetensors")
    shard.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 100)
    assert shard.name in refused(copy)


def test_no_weights(copy):
    [shard] = copy.glob("*.safetensors")
    shard.unlink()
    assert "safetensors" in refused(copy)


def tensors_of(copy):
    [shard] = copy.glob("*.safetensors")
    with safe_open(shard, "pt") as f:
        return shard, {name: f.get_tensor(name) for name in f.keys()}


def test_missing_tensor(copy):
    shard, tensors = tensors_of(copy)
    del tensors["model.language_model.layers.1.linear_attn.out_proj.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert "layers.1.linear_attn.out_proj.weight" in refused(copy)


def test_unexpected_tensor(copy):
    shard, tensors = tensors_of(copy)
    tensors["model.language_model.layers.1.linear_attn.surprise"] = tensors["lm_head.weight"].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    assert "surprise" in refused(copy)


def test_tensor_of_another_shape(copy):
    shard, tensors = tensors_of(copy)
    name = "model.language_model.layers.0.linear_attn.out_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    message = refused(copy)
    assert "layers.0.linear_attn.out_proj.weight" in message and "127" in message


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_model_len": 10**9}, "max_position_embeddings"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization"),
        ({"dtype": "float8"}, "--dtype"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"kv_cache_memory_bytes": 1000}, "--max-num-seqs"),
        ({"kv_cache_memory_bytes": 8 << 20, "max_model_len": 4096, "max_num_seqs": 2}, "--max-model-len"),
        ({"num_gpu_blocks_override": 2}, "--num-gpu-blocks-override"),
        ({"quantization": "awq"}, "--quantization"),
        ({"enable_prefix_caching": True}, "prefix"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_impossible_arguments(tiny_model, args, words):
    assert words in refused(tiny_model, **args)


def test_weights_that_cannot_fit_are_refused_before_loading():
    message = refused("preset:qwen3.5-397b-a17b", load_format="dummy")
    assert "weights take" in message and "GiB" in message
