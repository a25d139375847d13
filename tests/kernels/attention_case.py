"""Sequences in shuffled pages for the attention kernels' tests: once clean for the reference, once with everything poisoned that nobody owns."""

import torch

from vllm.forward_context import PAD_SLOT_ID, PagedAttentionMetadata
from vllm.model_executor.layers.ops.attention_torch import Pages, ProjectedRows

NOBODY = 1 << 30  # a page number that is far outside every pool


class AttentionCase:
    """Args:
    work: (tokens before, tokens now) of each sequence, decoding ones first; None is a decoding row of padding.
    pad_tokens: rows of nobody behind the last chunk.
    kv_dtype: of the pages; float8_e4m3fn gets scales other than one.
    """

    def __init__(
        self, work, H, Hkv, D, rotary_dim, dtype=torch.float32, kv_dtype=None, page=16, pad_tokens=0, device="cpu"
    ):
        kv_dtype = kv_dtype or dtype
        float8 = kv_dtype == torch.float8_e4m3fn
        lens = [item[1] if item else 1 for item in work]
        totals = [sum(item) if item else 0 for item in work]
        decodes = sum(item is None or (item[0] > 0 and item[1] == 1) for item in work)
        counts = [-(-total // page) for total in totals]
        order = (torch.randperm(sum(counts) + 2) + 1).tolist()
        tables = [[order.pop() for _ in range(count)] for count in counts]
        width = max(counts) + 2
        self.D, self.dtype, self.T = D, dtype, sum(lens) + pad_tokens
        self.used = torch.zeros(sum(counts) + 3, page, dtype=torch.bool)  # slots of earlier tokens
        slots, positions = [], []
        for item, table in zip(work, tables):
            before, now = item or (0, 1)
            for p in range(before):
                self.used[table[p // page], p % page] = True
            positions += range(before, before + now)
            slots += [table[p // page] * page + p % page if item else PAD_SLOT_ID for p in range(before, before + now)]
        slots += [PAD_SLOT_ID] * pad_tokens
        positions += [0] * pad_tokens
        self.used = self.used.to(device)
        shape = (sum(counts) + 3, page, Hkv, D)
        pools = [torch.where(self.used[..., None, None].cpu(), torch.randn(shape), 0) for _ in range(2)]
        scales = (0.5, 0.125) if float8 else (1.0, 1.0)
        self.clean = Pages(*(pool.to(kv_dtype).to(device) for pool in pools), *scales)
        angle = torch.tensor(positions)[:, None] * 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
        qkv = torch.randn(self.T, 2 * H * D + 2 * Hkv * D + 16)[:, 16:].to(device, dtype)
        nobodys = torch.tensor(slots, device=device) < 0
        self.clean_rows = ProjectedRows(
            qkv,
            torch.cat([angle.cos(), angle.sin()], dim=1).float().to(device),
            *(torch.randn(D).mul(0.3).to(device, dtype) for _ in "qk"),
            1e-6,
        )
        to = {"device": device, "dtype": torch.int32}
        table = torch.tensor([t + [0] * (width - len(t)) for t in tables], **to)
        owned = torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
        self.clean_meta, self.meta = (
            PagedAttentionMetadata(
                num_decodes=decodes,
                num_prefills=len(work) - decodes,
                query_start_loc=torch.tensor([0, *lens]).cumsum(0).to(**to),
                seq_lens=torch.tensor(totals, **to),
                block_table=torch.where(owned, table, filler),
                slot_mapping=torch.tensor(slots, device=device),
                query_lens_cpu=tuple(lens),
                seq_lens_cpu=tuple(totals),
                max_query_len=max(lens),
                max_seq_len=max(totals),
            )
            for filler in (0, NOBODY)
        )
        poisoned = torch.where(nobodys[:, None], float("nan"), qkv)
        self.rows = ProjectedRows(
            torch.nn.functional.pad(poisoned, (16, 0))[:, 16:],
            self.clean_rows.cos_sin,
            self.clean_rows.q_weight,
            self.clean_rows.k_weight,
            1e-6,
        )
        self.scale = D**-0.5
        self.out_shape = (self.T, H * D)
        # slots that this step writes
        self.written = torch.zeros_like(self.used)
        own = torch.tensor([slot for slot in slots if slot >= 0], device=device)
        self.written.view(-1)[own] = True

    def poisoned_pages(self) -> Pages:
        """The pages with NaN wherever no earlier token lies."""
        owned = self.used[..., None, None]
        if self.clean.float8:
            pools = (
                torch.where(owned, pool.view(torch.uint8), 0x7F).view(pool.dtype)
                for pool in (self.clean.keys, self.clean.values)
            )
        else:
            pools = (torch.where(owned, pool, float("nan")) for pool in (self.clean.keys, self.clean.values))
        return Pages(*pools, self.clean.k_scale, self.clean.v_scale)

    def out(self) -> torch.Tensor:
        return torch.full(self.out_shape, float("nan"), dtype=self.dtype, device=self.used.device)
