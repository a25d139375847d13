"""vLLM's engine flags that this server does not have, and what to do instead. Refused by name, never silently ignored.

A value that asks for what happens here anyway (--no-enable-prefix-caching, --pipeline-parallel-size 1) is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config.knob import flag


@dataclass(frozen=True)
class Unsupported:
    """A flag of vLLM's: what to use instead, and the values that change nothing here."""

    advice: str
    harmless: tuple[Any, ...] = ()
    boolean: bool = False
    short: str | None = None


def _switch(advice: str, *harmless: bool, short: str | None = None) -> Unsupported:
    return Unsupported(advice, harmless or (False,), boolean=True, short=short)


def _value(advice: str, *harmless: Any, short: str | None = None) -> Unsupported:
    return Unsupported(advice, harmless, short=short)


_ONE_DEVICE = "this version runs on one GPU; leave it out"
_NO_DRAFTS = "speculative decoding is not here yet; leave it out"
_NO_LORA = "adapters are not supported; merge the adapter into the weights and serve those"
_NO_MEDIA = "this version serves text only; leave it out"
_NO_TRANSFER = "there is no KV transfer or offloading; size the pages with --gpu-memory-utilization"
_IN_PROCESS = "the engine runs in one process; leave it out"
_NO_TLS = "the server speaks plain HTTP; let a reverse proxy such as nginx or Caddy do TLS"
_NO_PREFIXES = "prefix caching is not here yet; leave it out"

UNSUPPORTED: dict[str, Unsupported] = {
    # model
    "trust_remote_code": _switch("code from a checkpoint is never run; supported models need none"),
    "task": _value("only text generation is supported; leave it out", "auto", "generate"),
    "runner": _value("only text generation is supported; leave it out", "auto", "generate"),
    "convert": _value("only text generation is supported; leave it out", "auto", "none"),
    "config_format": _value("config.json is the only format; leave it out", "auto", "hf"),
    "hf_config_path": _value("put config.json into the model's folder, or use --hf-overrides"),
    "hf_token": _value("set the environment variable HF_TOKEN"),
    "code_revision": _value("code from a checkpoint is never run; leave it out"),
    "tokenizer_revision": _value("download that revision and pass its folder as --tokenizer"),
    "tokenizer_mode": _value("the fast Hugging Face tokenizer is the only one; leave it out", "auto", "hf"),
    "skip_tokenizer_init": _switch("the tokenizer is always loaded; leave it out"),
    "enable_prompt_embeds": _switch("prompts are text or token ids; leave it out"),
    "model_impl": _value("models are the project's own; leave it out", "auto", "vllm"),
    "override_attention_dtype": _value("attention computes in --dtype; use that"),
    "override_neuron_config": _value("only CUDA and CPU are supported; leave it out"),
    "pooler_config": _value("only text generation is supported; leave it out"),
    "logits_processor_pattern": _value("custom logits processors are not supported; use logit_bias or bad_words"),
    "logits_processors": _value("custom logits processors are not supported; use logit_bias or bad_words"),
    "logprobs_mode": _value("log-probabilities are those of the raw logits; leave it out", "raw_logprobs"),
    "disable_sliding_window": _switch("no supported model has a sliding window; leave it out"),
    "disable_cascade_attn": _switch("there is no cascade attention; leave it out", True),
    "enable_sleep_mode": _switch("the engine holds its memory until it ends; stop and start it instead"),
    "allow_deprecated_quantization": _switch("the checkpoint decides its quantisation; leave it out"),
    "allowed_local_media_path": _value(_NO_MEDIA, ""),
    "allowed_media_domains": _value(_NO_MEDIA),
    "io_processor_plugin": _value("there are no plugins; leave it out"),
    # load
    "model_loader_extra_config": _value("safetensors files are read as they are; leave it out", "{}"),
    "safetensors_load_strategy": _value("safetensors files are memory-mapped; leave it out", "lazy"),
    "ignore_patterns": _value("only *.safetensors and configs are read; leave it out"),
    "pt_load_map_location": _value("only safetensors checkpoints are read; leave it out"),
    # cache
    "enable_prefix_caching": _switch(_NO_PREFIXES),
    "prefix_caching_hash_algo": _value(_NO_PREFIXES),
    "mamba_cache_mode": _value(_NO_PREFIXES, "none"),
    "mamba_block_size": _value("GDN state lives in slots, not in blocks; leave it out"),
    "kv_sharing_fast_prefill": _switch("no supported model shares keys and values between layers; leave it out"),
    "calculate_kv_scales": _switch("scales of fp8 keys and values come from the checkpoint, or are 1; leave it out"),
    "cpu_kvcache_space": _value("use --kv-cache-memory-bytes"),
    "swap_space": _value("a preempted sequence is recomputed, not swapped; leave it out", "0"),
    "cpu_offload_gb": _value("weights stay on the GPU; use a quantised checkpoint", "0"),
    "kv_offloading_size": _value(_NO_TRANSFER),
    "kv_offloading_backend": _value(_NO_TRANSFER),
    "kv_transfer_config": _value(_NO_TRANSFER),
    "kv_events_config": _value(_NO_TRANSFER),
    # scheduler
    "max_num_partial_prefills": _value("the scheduler cuts prompts by --max-num-batched-tokens; use that", "1"),
    "max_long_partial_prefills": _value("the scheduler cuts prompts by --max-num-batched-tokens; use that", "1"),
    "long_prefill_token_threshold": _value("the scheduler cuts prompts by --max-num-batched-tokens; use that", "0"),
    "num_lookahead_slots": _value(_NO_DRAFTS, "0"),
    "disable_chunked_mm_input": _switch(_NO_MEDIA),
    "disable_hybrid_kv_cache_manager": _switch("pages and state slots are separate pools; leave it out"),
    "scheduler_cls": _value("use --scheduling-policy"),
    "num_scheduler_steps": _value("leave it out", "1"),
    "scheduler_reserve_full_isl": _switch("a sequence gets pages as it grows; leave it out"),
    # parallel
    "pipeline_parallel_size": _value(_ONE_DEVICE, "1", short="-pp"),
    "data_parallel_size": _value(f"{_ONE_DEVICE}; run one server a GPU behind a load balancer", "1", short="-dp"),
    "data_parallel_rank": _value(_ONE_DEVICE, short="-dpn"),
    "data_parallel_start_rank": _value(_ONE_DEVICE, short="-dpr"),
    "data_parallel_size_local": _value(_ONE_DEVICE, "1", short="-dpl"),
    "data_parallel_address": _value(_ONE_DEVICE, short="-dpa"),
    "data_parallel_rpc_port": _value(_ONE_DEVICE, short="-dpp"),
    "data_parallel_backend": _value(_ONE_DEVICE, short="-dpb"),
    "data_parallel_hybrid_lb": _switch(_ONE_DEVICE),
    "data_parallel_external_lb": _switch(_ONE_DEVICE),
    "decode_context_parallel_size": _value(_ONE_DEVICE, "1", short="-dcp"),
    "prefill_context_parallel_size": _value(_ONE_DEVICE, "1", short="-pcp"),
    "enable_expert_parallel": _switch(_ONE_DEVICE, short="-ep"),
    "enable_eplb": _switch(_ONE_DEVICE),
    "eplb_config": _value(_ONE_DEVICE),
    "all2all_backend": _value(_ONE_DEVICE),
    "enable_dbo": _switch(_ONE_DEVICE),
    "expert_placement_strategy": _value(_ONE_DEVICE),
    "distributed_executor_backend": _value(_ONE_DEVICE, "uni"),
    "nnodes": _value(_ONE_DEVICE, "1"),
    "node_rank": _value(_ONE_DEVICE, "0"),
    "master_addr": _value(_ONE_DEVICE),
    "master_port": _value(_ONE_DEVICE),
    "disable_custom_all_reduce": _switch("one GPU has nothing to reduce; leave it out", True, False),
    "max_parallel_loading_workers": _value("weights are read by one process; leave it out"),
    "ray_workers_use_nsight": _switch("there are no Ray workers; run the server under nsys"),
    "worker_cls": _value(_IN_PROCESS, "auto"),
    "worker_extension_cls": _value(_IN_PROCESS, ""),
    "disable_nccl_for_dp_synchronization": _switch(_ONE_DEVICE),
    # speculation, compilation, kernels
    "speculative_config": _value(_NO_DRAFTS, "null", short="-sc"),
    "cuda_graph_sizes": _value("use --compilation-config.cudagraph_capture_sizes"),
    "cudagraph_capture_sizes": _value("use --compilation-config.cudagraph_capture_sizes"),
    "max_cudagraph_capture_size": _value("use --compilation-config.max_cudagraph_capture_size"),
    "kernel_config": _value("kernels are chosen by the device; for GDN see --gdn-in-proj"),
    "attention_backend": _value("there is one attention kernel a device; leave it out", "auto"),
    "attention_config": _value("there is one attention kernel a device; leave it out"),
    "moe_backend": _value("there is one MoE kernel a device; leave it out", "auto"),
    "mamba_backend": _value("kernels are chosen by the device; for GDN see --gdn-in-proj"),
    "additional_config": _value("every setting has its own flag; see --help", "{}"),
    # adapters
    "enable_lora": _switch(_NO_LORA),
    "lora_modules": _value(_NO_LORA),
    "max_loras": _value(_NO_LORA),
    "max_lora_rank": _value(_NO_LORA),
    "max_cpu_loras": _value(_NO_LORA),
    "lora_dtype": _value(_NO_LORA, "auto"),
    "lora_extra_vocab_size": _value(_NO_LORA),
    "fully_sharded_loras": _switch(_NO_LORA),
    "default_mm_loras": _value(_NO_LORA),
    # images and video
    "limit_mm_per_prompt": _value(_NO_MEDIA),
    "enable_mm_embeds": _switch(_NO_MEDIA),
    "interleave_mm_strings": _switch(_NO_MEDIA),
    "media_io_kwargs": _value(_NO_MEDIA),
    "mm_processor_kwargs": _value(_NO_MEDIA),
    "mm_processor_cache_gb": _value(_NO_MEDIA, "0"),
    "mm_processor_cache_type": _value(_NO_MEDIA),
    "mm_encoder_tp_mode": _value(_NO_MEDIA),
    "mm_encoder_attn_backend": _value(_NO_MEDIA),
    "skip_mm_profiling": _switch(_NO_MEDIA, True, False),
    "video_pruning_rate": _value(_NO_MEDIA),
    # output and observation
    "structured_outputs_config": _value("requests say what they want in structured_outputs; leave it out"),
    "guided_decoding_backend": _value("structured output is always xgrammar's; leave it out", "auto", "xgrammar"),
    "observability_config": _value("there is no tracing; leave it out"),
    "otlp_traces_endpoint": _value("there is no tracing; leave it out"),
    "collect_detailed_traces": _value("there is no tracing; leave it out"),
    "show_hidden_metrics_for_version": _value("no metric is hidden; leave it out"),
    "kv_cache_metrics": _switch("there are no per-page metrics; leave it out"),
    "profiler_config": _value("start the server with VLLM_SERVER_DEV_MODE=1 and use /start_profile and /stop_profile"),
    # the HTTP server
    "uds": _value("the server listens on TCP; use --host and --port"),
    "ssl_keyfile": _value(_NO_TLS),
    "ssl_certfile": _value(_NO_TLS),
    "ssl_ca_certs": _value(_NO_TLS),
    "ssl_cert_reqs": _value(_NO_TLS, "0"),
    "ssl_ciphers": _value(_NO_TLS),
    "enable_ssl_refresh": _switch(_NO_TLS),
    "middleware": _value("put what it does into a reverse proxy"),
    "response_role": _value('answers have the role "assistant"; leave it out', "assistant"),
    "return_tokens_as_token_ids": _switch("requests may ask for it with return_tokens_as_token_ids"),
    "tool_parser_plugin": _value("there are no plugins; see --tool-call-parser", ""),
    "reasoning_config": _value("the parser knows where thinking begins and ends; see --reasoning-parser"),
    "reasoning_parser_plugin": _value("there are no plugins; see --reasoning-parser", ""),
    "tool_server": _value("tools are run by the client; leave it out"),
    "log_config_file": _value("VLLM_LOGGING_LEVEL and --uvicorn-log-level set what is logged"),
    "max_log_len": _value("prompts are not logged; leave it out"),
    "enable_log_outputs": _switch("outputs are not logged; leave it out"),
    "enable_log_deltas": _switch("outputs are not logged; leave it out", True, False),
    "disable_log_requests": _switch("requests are logged only with --enable-log-requests; leave it out", True, False),
    "log_error_stack": _switch("VLLM_LOGGING_LEVEL=DEBUG shows where errors come from"),
    "disable_access_log_for_endpoints": _value("there is no access log by default; leave it out"),
    "enable_server_load_tracking": _switch("/load is always there; leave it out", True, False),
    "enable_request_id_headers": _switch("answers always have X-Request-Id; leave it out", True, False),
    "enable_offline_docs": _switch("/openapi.json needs no network; leave it out"),
    "h11_max_incomplete_event_size": _value("h11 is not used; for bodies see --max-body-size"),
    "h11_max_header_count": _value("h11 is not used; leave it out"),
    "headless": _switch(_ONE_DEVICE),
    "api_server_count": _value("one process serves HTTP; leave it out", "1"),
    "grpc": _switch("there is only the HTTP server; leave it out"),
    "tokens_only": _switch("leave it out"),
    "use_v2_block_manager": _switch("leave it out", True, False),
}


def refuse(name: str, value: Any, spelled: str | None = None) -> None:
    """Raise ValueError for a value of one of vLLM's flags that would change something; return for a harmless one.

    Args:
        name: a key of UNSUPPORTED.
        value: what was given: a bool, a command-line string, or any Python value of a keyword argument.
        spelled: how the user wrote it; default: the flag.
    """
    entry = UNSUPPORTED[name]
    if value is None or value in entry.harmless or (not entry.boolean and str(value) in entry.harmless):
        return
    raise ValueError(f"{spelled or flag(name)} is not supported: {entry.advice}")
