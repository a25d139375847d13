"""Train the bundled tiny checkpoint from nothing, or score a saved one.

    python tools/train_tiny.py --out DIR --steps 20000 --seed 0     # one GPU, or slowly a CPU
    python tools/train_tiny.py --out DIR --minutes 8                # number of steps from the measured step time
    python tools/train_tiny.py --check DIR                          # held-out accuracy through transformers, CPU

The seed fixes the start values, every training batch and every held-out item exactly, on any machine and with any
number of data workers. The trained weights are not bit-exact: GPU reductions add in varying order, and kernels differ
between devices and versions; the accuracies repeat within a fraction of a percent.

On a GPU the hot functions are compiled and the whole step (forward, backward, clipping, AdamW) is one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import numpy as np  # noqa: E402
import tiny_model  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_data import ANSWER, CONTEXT, LONG_LENGTH, SHORT_LENGTH, Shape, batches  # noqa: E402
from tiny_folder import load_parameters, save_folder, text_config  # noqa: E402
from tiny_score import TransformersDecoder, failed_gates, own_decoder, score  # noqa: E402
from tiny_tokenizer import FIRST_ADDED_ID  # noqa: E402
from torch import Tensor  # noqa: E402

from vllm.benchmarks.tiny_tasks import KINDS  # noqa: E402

CONTEXT_WEIGHT = 0.02  # what people type is mostly noise to the model
MTP_WEIGHT = 0.2
BALANCE_WEIGHT = 0.01
WARMUP_STEPS = 300
TIMED_STEPS = 60
INT4_FROM = 0.3  # share of the run after which every second step, on average, trains 4-bit weights


class Trainer:
    """Parameters, optimiser, fixed input buffers, and one step as a plain call or as a replayed CUDA graph."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.text = text_config(FIRST_ADDED_ID)
        start = load_parameters(args.init, self.text) if args.init else tiny_model.init_parameters(self.text, args.seed)
        self.params = {name: value.to(self.device).requires_grad_() for name, value in start.items()}
        on_gpu = self.device.type == "cuda"
        self.rate = torch.zeros((), device=self.device)
        plain = [p for name, p in self.params.items() if p.dim() < 2 or "embed_tokens" in name]
        decayed = [p for name, p in self.params.items() if p.dim() >= 2 and "embed_tokens" not in name]
        self.optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": args.weight_decay}],
            lr=self.rate, betas=(0.9, 0.98), eps=1e-9, fused=on_gpu, capturable=on_gpu,
        )  # fmt: skip
        shape = Shape(args.short_rows, args.long_rows)
        self.ids = [
            torch.zeros(rows, length, dtype=torch.long, device=self.device)
            for rows, length in ((shape.short, SHORT_LENGTH), (shape.long, LONG_LENGTH))
        ]
        self.codes = [torch.zeros_like(ids) for ids in self.ids]
        self.code_weight = torch.zeros(3, device=self.device)
        self.code_weight[CONTEXT], self.code_weight[ANSWER] = CONTEXT_WEIGHT, 1.0
        self.int4_gate = torch.zeros((), device=self.device)
        self.losses = torch.zeros(3, device=self.device)  # target, MTP, load balance
        self.graph: torch.cuda.CUDAGraph | None = None
        self.compiled = False

    def _step(self) -> None:
        w = tiny_model.working_weights(self.params, self.int4_gate)
        weights = [self.code_weight[codes] for codes in self.codes]
        sums = [tiny_model.loss_sums(w, self.text, ids, weight) for ids, weight in zip(self.ids, weights)]
        total = sum(weight.sum() for weight in weights)
        target, draft, balance = (sum(part) for part in zip(*sums))
        losses = torch.stack([target / total, draft / total, balance / len(sums)])
        (losses[0] + MTP_WEIGHT * losses[1] + BALANCE_WEIGHT * losses[2]).backward()
        torch.nn.utils.clip_grad_norm_(list(self.params.values()), 1.0)
        self.optimizer.step()
        self.losses.copy_(losses.detach())

    def prepare(self, batch: tuple[np.ndarray, ...]) -> None:
        """On a GPU: compile and capture. The trial steps run at rate 0 and leave the parameters as they are."""
        if self.device.type != "cuda":
            return
        self.load(batch)
        try:
            tiny_model.compile_parts(self.args.compile)
            self.compiled = self.args.compile
            self._trial_steps()
        except Exception as error:
            if not self.compiled:
                raise
            print(f"compilation failed, running plain: {type(error).__name__}: {str(error)[:2000]}", flush=True)
            tiny_model.compile_parts(False)
            self.compiled = False
            self._trial_steps()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph
        tiny_model.compile_parts(False)  # scoring has other shapes: no compiling for those

    def _trial_steps(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def load(self, batch: tuple[np.ndarray, ...]) -> None:
        """Copy one batch of tiny_data into the input buffers."""
        for target, array in zip((self.ids[0], self.codes[0], self.ids[1], self.codes[1]), batch):
            source = torch.from_numpy(array.astype(np.int32))
            target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)

    def step(self, batch: tuple[np.ndarray, ...], rate: float, int4: bool) -> None:
        """One optimiser step; `losses` holds its losses afterwards."""
        self.load(batch)
        self.rate.fill_(rate)
        self.int4_gate.fill_(float(int4))
        if self.graph is not None:
            self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self._step()

    @torch.no_grad()
    def weights(self, rounding=None) -> dict[str, Tensor]:
        """Working weights as saved, optionally with `rounding` applied to the quantisable ones."""
        w = tiny_model.working_weights({name: value.detach() for name, value in self.params.items()})
        if rounding is not None:
            w = {name: rounding(v) if tiny_model.is_quantisable(name, v) else v for name, v in w.items()}
        return w

    def score(self, share: float, rounding=None, thinking: bool = False) -> dict:
        """Held-out accuracy of the present weights."""
        kinds = [kind for kind in KINDS if not (thinking and kind == "completion")]
        return score(own_decoder(self.weights(rounding), self.text), share, thinking, kinds)


def learning_rate(step: int, steps: int | None, peak: float) -> float:
    """Linear warm-up, then a cosine that ends at zero; flat while the number of steps is not known yet."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    if steps is None:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def brief(result: dict) -> str:
    """One line for the console."""
    parts = [f"{kind} {accuracy:.3f}" for kind, accuracy in result["kinds"].items()]
    return ", ".join(parts) + f", mtp {result['mtp_acceptance']:.3f} ({result['seconds']} s)"


def train(args: argparse.Namespace) -> dict:
    """Run the training, save the folder, return the log that goes to disk as JSON."""
    began = time.time()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    source = batches(args.seed, Shape(args.short_rows, args.long_rows), args.workers)
    trainer = Trainer(args)
    first = next(source)
    trainer.prepare(first)
    on_gpu = trainer.device.type == "cuda"
    log: dict = {
        "command": "python tools/train_tiny.py " + " ".join(args.shown),
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "compiled": trainer.compiled,
        "rows": {"short": [args.short_rows, SHORT_LENGTH], "long": [args.long_rows, LONG_LENGTH]},
        "peak_rate": args.rate,
        "weight_decay": args.weight_decay,
        "prepare_seconds": round(time.time() - began, 1),
        "curve": [],
        "held_out": [],
    }  # fmt: skip
    print(f"ready after {log['prepare_seconds']} s, compiled: {trainer.compiled}", flush=True)

    steps, step, batch, timer = args.steps, 0, first, time.time()
    while steps is None or step < steps:
        coin = random.Random(f"int4/{args.seed}/{step}").random() < 0.5
        int4 = coin and steps is not None and step >= INT4_FROM * steps
        trainer.step(batch, learning_rate(step, steps, args.rate), int4)
        batch = next(source)
        step += 1
        if step == TIMED_STEPS:
            trainer.losses.tolist()  # waits for the device
            timer = time.time()
        if step == 4 * TIMED_STEPS:
            trainer.losses.tolist()
            log["step_milliseconds"] = round((time.time() - timer) / (3 * TIMED_STEPS) * 1000, 2)
            if steps is None:
                left = args.minutes * 60 - (time.time() - began)
                steps = step + max(1, int(left / log["step_milliseconds"] * 1000 * 0.96))
            print(f"{log['step_milliseconds']} ms a step, {steps} steps", flush=True)
        if step % 100 == 0:
            log["curve"].append([step, *(round(x, 5) for x in trainer.losses.tolist())])
            if not all(map(math.isfinite, log["curve"][-1])):
                raise RuntimeError(f"loss is not finite at step {step}: {log['curve'][-1]}")
        if steps is not None and step % max(1, steps // args.evaluations) == 0 and step < steps:
            result = trainer.score(0.3 * args.final_share)
            log["held_out"].append({"step": step, "seconds": round(time.time() - began, 1), **result})
            losses = [round(x, 4) for x in trainer.losses.tolist()]
            print(f"step {step}, {time.time() - began:.0f} s, losses {losses}\n  {brief(result)}", flush=True)
            save_folder(args.out, trainer.params, args.seed)
    source.close()
    log["steps"] = step
    log["train_seconds"] = round(time.time() - began, 1)
    save_folder(args.out, trainer.params, args.seed)
    for name, rounding, thinking in (
        ("final", None, False),
        ("final_thinking", None, True),
        ("final_int4", tiny_model.fake_int4, False),
        ("final_fp8", tiny_model.fake_fp8, False),
    ):
        log[name] = trainer.score(args.final_share, rounding, thinking)
        print(f"{name}: {brief(log[name])}\n  {log[name]['failures']}", flush=True)
    log["failed_gates"] = failed_gates(log["final"])
    log["seconds"] = round(time.time() - began, 1)
    return log


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line; `shown` is it without the folder names, for the log."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the trained checkpoint")
    parser.add_argument("--check", type=Path, help="score this folder through transformers instead of training")
    parser.add_argument("--log", type=Path, help="JSON log (default: OUT/train_tiny.json)")
    parser.add_argument("--init", type=Path, help="start from this folder's weights instead of random ones")
    parser.add_argument("--steps", type=int, help="number of steps; or give --minutes")
    parser.add_argument("--minutes", type=float, help="wall-clock minutes for training, scoring afterwards not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of --check")
    parser.add_argument(
        "--share", dest="final_share", type=float, default=1.0, help="share of the held-out items to score"
    )
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--short-rows", type=int, default=768)
    parser.add_argument("--long-rows", type=int, default=128)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--evaluations", type=int, default=8, help="how often to score during training")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args(argv)
    hidden = ("--out", "--log", "--check", "--init")
    args.shown = [word for i, word in enumerate(argv) if word not in hidden and (i == 0 or argv[i - 1] not in hidden)]
    if args.check is None and (args.out is None or (args.steps is None) == (args.minutes is None)):
        parser.error("give --check DIR, or --out DIR and one of --steps and --minutes")
    return args


def main(argv: list[str]) -> int:
    """Exit status 0 when every gate is met."""
    args = parse(argv)
    if args.check is not None:
        result = score(TransformersDecoder(args.check, getattr(torch, args.dtype)), args.final_share)
        result["failed_gates"] = failed_gates(result)
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return int(bool(result["failed_gates"]))
    log = train(args)
    path = args.log or args.out / "train_tiny.json"
    path.write_text(json.dumps(log, ensure_ascii=False) + "\n")
    print(
        f"{log['steps']} steps in {log['train_seconds']} s; gates missed: {log['failed_gates'] or 'none'}", flush=True
    )
    return int(bool(log["failed_gates"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
