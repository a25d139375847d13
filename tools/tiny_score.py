"""Accuracy of the tiny checkpoint: with the trainer's own network, or through transformers on a saved folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_data import Encoder
from tiny_model import CHUNK, language_model, mtp_model
from torch import Tensor

from vllm.benchmarks import tiny_tasks
from vllm.benchmarks.tiny_tasks import Item

ROWS = 512  # sequences decoded side by side

# kind -> (items asked, lowest accepted share of right answers)
GATES = {
    "add2": (500, 0.95),
    "add3": (500, 0.80),
    "copy": (200, 0.90),
    "reverse": (200, 0.90),
    "count": (200, 0.90),
    "tool": (200, 0.90),
    "tool_loop": (200, 0.90),
    "parallel": (100, 0.90),
    "completion": (200, 0.80),
    "other": (100, 0.90),
}
MTP_GATE = 0.60

# What decodes: (prompts, most new tokens, end ids) -> (new token ids of each prompt, drafts right, drafts made).
Decoder = Callable[[list[list[int]], int, tuple[int, ...]], tuple[list[list[int]], int, int]]


def _drafts(draft: Tensor, ids: Tensor, prompt_lengths: list[int], lengths: list[int]) -> tuple[int, int]:
    """Counts drafts that agree with the greedy text.

    draft [B, L]: at i the token drafted for place i+2, when the target has just produced place i+1. ids [B, L].
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    first, end = (torch.tensor(x, device=ids.device)[:, None] for x in (prompt_lengths, lengths))
    asked = (place + 1 >= first) & (place + 2 < end)
    right = (draft == ids.roll(-2, 1)) & asked
    return int(right.sum()), int(asked.sum())


def own_decoder(w: dict[str, Tensor], text: dict) -> Decoder:
    """Greedy decoding with the trainer's network: every step runs the whole rows again, so no cache can be wrong."""
    device = w["lm_head.weight"].device

    @torch.no_grad()
    def decode(prompts, limit, ends):
        produced, right, asked = [], 0, 0
        for start in range(0, len(prompts), ROWS):
            rows = prompts[start : start + ROWS]
            starts = [len(row) for row in rows]
            length = -(-(max(starts) + limit) // CHUNK) * CHUNK
            ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
            at = torch.tensor(starts, device=device)
            each = torch.arange(len(rows), device=device)
            done = torch.zeros(len(rows), dtype=torch.bool, device=device)
            end_ids = torch.tensor(ends, device=device)
            for _ in range(limit):
                hidden, _ = language_model(w, text, ids[:, : -(-int(at.max()) // CHUNK) * CHUNK])
                token = (hidden[each, at - 1] @ w["lm_head.weight"].T).argmax(-1)
                ids[each, at] = torch.where(done, ids[each, at], token)
                at = at + ~done
                done |= torch.isin(token, end_ids)
                if bool(done.all()):
                    break
            lengths = at.tolist()
            hidden, _ = language_model(w, text, ids)
            drafted, _ = mtp_model(w, text, ids, hidden)
            counts = _drafts((drafted @ w["lm_head.weight"].T).argmax(-1), ids, starts, lengths)
            right, asked = right + counts[0], asked + counts[1]
            produced += [row[a:b] for row, a, b in zip(ids.tolist(), starts, lengths)]
        return produced, right, asked

    return decode


class TransformersDecoder:
    """The same through transformers on a saved folder, cached decoding, prompts of one length side by side.

    transformers has no MTP for this family: the draft layer is its own full-attention decoder layer, fed by hand.
    """

    def __init__(self, folder: Path, dtype: torch.dtype):
        from safetensors.torch import load_file
        from transformers import AutoModelForImageTextToText
        from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        config = self.model.config.text_config
        config.layer_types, kept = ["full_attention"], config.layer_types
        self.layer = modeling.Qwen3_5MoeDecoderLayer(config, 0)
        config.layer_types = kept
        norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        self.norms = torch.nn.ModuleDict({n: modeling.Qwen3_5MoeRMSNorm(config.hidden_size) for n in norms})
        tensors = load_file(folder / "model.safetensors")
        pick = {name.removeprefix("mtp."): value for name, value in tensors.items() if name.startswith("mtp.")}
        self.fc = pick.pop("fc.weight").to(dtype)
        own = {name.removeprefix("layers.0."): value for name, value in pick.items() if name.startswith("layers.0.")}
        self.layer.load_state_dict(own)
        self.norms.load_state_dict({name: value for name, value in pick.items() if not name.startswith("layers.0.")})
        self.layer.to(dtype).eval()
        self.norms.to(dtype)

    @torch.no_grad()
    def __call__(self, prompts, limit, ends):
        produced: list[list[int]] = [[] for _ in prompts]
        right = asked = 0
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(i)
        for length, members in by_length.items():
            ids = torch.tensor([prompts[i] for i in members])
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False,
                eos_token_id=list(ends), pad_token_id=0, temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
            lengths = []
            for row, i in zip(out.tolist(), members):
                new = row[length:]
                stop = next((n + 1 for n, token in enumerate(new) if token in ends), len(new))
                produced[i] = new[:stop]
                lengths.append(length + stop)
            counts = _drafts(self._draft(out), out, [length] * len(members), lengths)
            right, asked = right + counts[0], asked + counts[1]
        return produced, right, asked

    def _draft(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> the token the draft layer proposes for place i+2, [B, L]."""
        inner = self.model.model.language_model
        hidden = inner(input_ids=ids).last_hidden_state
        embedded = self.norms["pre_fc_norm_embedding"](inner.embed_tokens(ids.roll(-1, 1)))
        x = F.linear(torch.cat([embedded, self.norms["pre_fc_norm_hidden"](hidden)], -1), self.fc)
        places = torch.arange(ids.shape[1])[None]
        rotary = inner.rotary_emb(x, places[None].expand(3, 1, -1))
        mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), dtype=x.dtype).triu(1)[None, None]
        x = self.layer(x, position_embeddings=rotary, attention_mask=mask, position_ids=places)
        return self.model.lm_head(self.norms["norm"](x)).argmax(-1)


def score(decode: Decoder, share: float = 1.0, thinking: bool = False, kinds=tiny_tasks.KINDS) -> dict:
    """Exact-answer accuracy on held-out items, greedy.

    `share` scales the number of items. Returns {"kinds": {kind: accuracy}, "items": {...}, "mtp_acceptance": share of
    greedy steps whose first draft token was right, "failures": a few wrong answers}.
    """
    encoder = Encoder()
    im_end, end_of_text, new_line = (encoder.encode(t)[0] for t in ("<|im_end|>", "<|endoftext|>", "\n"))
    began, right, asked = time.time(), 0, 0
    result: dict = {"kinds": {}, "items": {}, "mtp_by_kind": {}, "failures": {}}
    for kind in kinds:
        items: list[Item] = tiny_tasks.generate(kind, max(1, int(GATES[kind][0] * share)))
        prompts = [encoder.item_prompt(item, thinking) for item in items]
        limit = max(len(encoder.answer(item, thinking)) for item in items) + 4
        ends = (im_end, end_of_text, new_line) if kind == "completion" else (im_end, end_of_text)
        produced, drafts_right, drafts = decode(prompts, limit, ends)
        texts = [encoder.tokenizer.decode(ids) for ids in produced]
        verdicts = [item.score(text) for item, text in zip(items, texts)]
        result["kinds"][kind] = round(sum(verdicts) / len(verdicts), 4)
        result["items"][kind] = len(items)
        result["mtp_by_kind"][kind] = round(drafts_right / max(drafts, 1), 4)
        wrong = [(item.expected, text) for item, text, good in zip(items, texts, verdicts) if not good]
        if wrong:
            result["failures"][kind] = wrong[:3]
        right, asked = right + drafts_right, asked + drafts
    result["mtp_acceptance"] = round(right / max(asked, 1), 4)
    result["seconds"] = round(time.time() - began, 1)
    return result


def failed_gates(result: dict) -> list[str]:
    """The gates that a full `score` result misses, in words."""
    missed = [
        f"{kind} {accuracy:.3f} < {GATES[kind][1]}"
        for kind, accuracy in result["kinds"].items()
        if accuracy < GATES[kind][1]
    ]
    if result["mtp_acceptance"] < MTP_GATE:
        missed.append(f"mtp_acceptance {result['mtp_acceptance']:.3f} < {MTP_GATE}")
    return missed
