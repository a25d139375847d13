"""`vllm plan`: where a GPU's memory would go, from config.json alone. Needs no GPU, no weights and no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.nvidia_smi import gpus
from vllm.v1.core import memory_plan
from vllm.v1.core.memory_plan import GiB, MemoryPlan, format_bytes

CARDS_GIB = (24, 32, 48, 80, 96, 141)
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UTILIZATION = (0.80, 0.85, 0.90, 0.95)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The engine's flags, and this command's own."""
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GiB", help="the GPU's memory; default: that of the first GPU here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    EngineArgs.add_cli_args(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan. That the limits asked for do not fit is an answer, not an error."""
    if args.gpu_memory is not None and args.gpu_memory <= 0:
        raise ValueError(f"--gpu-memory must be above 0; got {args.gpu_memory:g}")
    # "dummy" leaves the weights of a hub model where they are; the plan is for a GPU, whether or not one is here.
    engine = dataclasses.replace(EngineArgs.from_cli_args(args), load_format="dummy")
    config = engine.create_engine_config(device="cpu" if engine.device == "cpu" else "cuda")
    here = [] if args.gpu_memory is not None else gpus()
    memory = int(args.gpu_memory * GiB) if args.gpu_memory is not None else here[0].memory_bytes if here else None
    if args.json:
        print(json.dumps(as_json(config, memory), indent=2))
        return 0
    print(model_table(config))
    if memory is None:
        print("\nNo GPU here, and no --gpu-memory: the contexts that common cards leave room for.")
        print(cards_table(config))
        return 0
    whose = here[0].name if here else "GPU"
    print(f"\n{whose} {make_plan(config, memory).describe()}\n")
    print(ceiling_table(config, memory))
    return 0


def make_plan(config: VllmConfig, memory: int, utilization: float | None = None, seqs: int | None = None) -> MemoryPlan:
    """The plan of a device of `memory` bytes; the config's own utilisation and concurrency unless others are given."""
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    seqs = scheduler.max_num_seqs if seqs is None else seqs
    return memory_plan.plan(
        config.hf_config.text,
        device_bytes=memory,
        utilization=cache.gpu_memory_utilization if utilization is None else utilization,
        max_model_len=model.max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(scheduler.max_num_batched_tokens, seqs),
        block_size=cache.block_size,
        dtype=model.dtype,
        **_state_dtypes(config),
        quant=config.quant_scheme,
        kv_cache_memory_bytes=cache.kv_cache_memory_bytes,
        num_gpu_blocks_override=cache.num_gpu_blocks_override,
    )


def ceiling(config: VllmConfig, memory: int, utilization: float, seqs: int) -> int:
    """Tokens each of `seqs` sequences can have at once, if the server is started for that many; 0: does not fit."""
    budget = make_plan(config, memory, utilization, seqs).budget
    return memory_plan.context_ceiling(
        config.hf_config.text, budget, seqs, block_size=config.cache_config.block_size, **_state_dtypes(config)
    )


def model_table(config: VllmConfig) -> str:
    """Weights by component, and what a sequence and a token cost."""
    text, model, scheduler = config.hf_config.text, config.model_config, config.scheduler_config
    parameters = memory_plan.weight_parameters(text)
    weights = memory_plan.weight_bytes(text, model.dtype, config.quant_scheme)
    total = sum(parameters.values())
    lines = [
        f"{model.model}: {config.hf_config.architecture}, {total / 1e9:.2f} billion parameters",
        f"{text.num_hidden_layers} layers: {text.num_gdn_layers} Gated DeltaNet, {text.num_attention_layers} attention",
        "",
    ]
    rows = [
        [name, f"{count / 1e6:,.1f} M", format_bytes(weights[name]), f"{8 * weights[name] / count:.2g} bits"]
        for name, count in parameters.items()
        if count
    ]
    rows.append(["weights, all", f"{total / 1e6:,.1f} M", format_bytes(sum(weights.values())), ""])
    lines += [table(["component", "parameters", "bytes", ""], rows), ""]
    cache, dtypes = config.cache_config, _state_dtypes(config)
    slot = memory_plan.state_bytes_per_slot(text, dtypes["conv_dtype"], dtypes["ssm_dtype"])
    token = memory_plan.kv_bytes_per_token(text, dtypes["kv_dtype"])
    workspace = memory_plan.workspace_bytes(
        text,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        dtype=model.dtype,
        quant=config.quant_scheme,
    )
    lines += [
        f"GDN state   {format_bytes(slot)} a sequence, however long (recurrent {cache.mamba_ssm_cache_dtype}, window {cache.mamba_cache_dtype})",
        f"KV pages    {format_bytes(token)} a token ({cache.kv_cache_dtype})",
        f"workspace   {format_bytes(workspace)} for {scheduler.max_num_batched_tokens} tokens and {scheduler.max_num_seqs} sequences a step and its CUDA graphs (estimate), "
        f"and {format_bytes(memory_plan.RUNTIME_RESERVE)} for CUDA itself",
    ]
    left_out = [name for name, there in _left_out(config).items() if there]
    if left_out:
        lines.append(f"not loaded  {' and '.join(left_out)}: this version serves text, one token at a time")
    return "\n".join(lines)


def ceiling_table(config: VllmConfig, memory: int) -> str:
    """Concurrency down, share of the memory across."""
    shares = sorted({*UTILIZATION, config.cache_config.gpu_memory_utilization})
    rows = [[str(n), *(_tokens(ceiling(config, memory, share, n)) for share in shares)] for n in CONCURRENCY]
    head = "Longest context of each sequence, by sequences at once and --gpu-memory-utilization:"
    return head + "\n" + table(["sequences", *(f"{share:.2f}" for share in shares)], rows)


def cards_table(config: VllmConfig) -> str:
    """Concurrency down, cards across."""
    share = config.cache_config.gpu_memory_utilization
    rows = [[str(n), *(_tokens(ceiling(config, card * GiB, share, n)) for card in CARDS_GIB)] for n in CONCURRENCY]
    head = f"Longest context of each sequence, by sequences at once and the card's memory (--gpu-memory-utilization {share:g}):"
    return head + "\n" + table(["sequences", *(f"{card} GiB" for card in CARDS_GIB)], rows)


def as_json(config: VllmConfig, memory: int | None) -> dict[str, Any]:
    """Everything the tables show; bytes and tokens as integers. `device` is null where no memory size is known."""
    text, dtypes = config.hf_config.text, _state_dtypes(config)
    cards = [card * GiB for card in CARDS_GIB] if memory is None else [memory]
    share = config.cache_config.gpu_memory_utilization
    shares = [share] if memory is None else sorted({*UTILIZATION, share})
    scheduler = config.scheduler_config
    result: dict[str, Any] = {
        "model": config.model_config.model,
        "architecture": config.hf_config.architecture,
        "parameters": memory_plan.weight_parameters(text),
        "weight_bytes": memory_plan.weight_bytes(text, config.model_config.dtype, config.quant_scheme),
        "state_bytes_per_sequence": memory_plan.state_bytes_per_slot(text, dtypes["conv_dtype"], dtypes["ssm_dtype"]),
        "kv_bytes_per_token": memory_plan.kv_bytes_per_token(text, dtypes["kv_dtype"]),
        "workspace_bytes": memory_plan.workspace_bytes(
            text,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_num_seqs=scheduler.max_num_seqs,
            dtype=config.model_config.dtype,
            quant=config.quant_scheme,
        ),
        "runtime_bytes": memory_plan.RUNTIME_RESERVE,
        "device": None,
        "ceilings": [
            {"device_bytes": card, "utilization": u, "sequences": n, "tokens": ceiling(config, card, u, n)}
            for card in cards
            for u in shares
            for n in CONCURRENCY
        ],
    }
    if memory is not None:
        found = make_plan(config, memory)
        result["device"] = {
            "bytes": memory,
            "utilization": share,
            "max_model_len": found.max_model_len,
            "max_num_seqs": found.max_num_seqs,
            "fits": found.pools is not None,
            "problem": found.problem,
            "pools": found.pools and dataclasses.asdict(found.pools),
        }
    return result


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns two spaces apart, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _state_dtypes(config: VllmConfig) -> dict[str, str]:
    cache = config.cache_config
    return {
        "kv_dtype": cache.kv_cache_dtype,
        "conv_dtype": cache.mamba_cache_dtype,
        "ssm_dtype": cache.mamba_ssm_cache_dtype,
    }


def _left_out(config: VllmConfig) -> dict[str, bool]:
    return {"vision tower": config.hf_config.has_vision, "MTP layer": config.hf_config.text.mtp_num_hidden_layers > 0}


def _tokens(count: int) -> str:
    return f"{count:,}" if count else "-"
