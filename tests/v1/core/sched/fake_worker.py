"""A worker that holds the scheduler to its contract, and whose tokens depend on every page and slot it was given.

Keys and values are token ids in pages, the recurrent state is a number in a slot, and the next token is a function of both,
read back through the page table and the slot index. Pages that two sequences share, a slot that is handed on too early or a
token computed twice come out as another text, even where no check names the fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from vllm.config.scheduler import SchedulerConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput, TokenLogprobs

VOCABULARY = 24
EOS = frozenset({0, 1})


class ContractError(AssertionError):
    """The scheduler asked for what a worker cannot do."""


def require(condition: bool, fault: str) -> None:
    if not condition:
        raise ContractError(fault)


@dataclass(frozen=True)
class Setup:
    """Sizes and limits, shared by scheduler, worker and oracle. Page 0 and slot 0 count."""

    policy: str = "fcfs"
    chunked: bool = True
    block_size: int = 4
    num_blocks: int = 65
    num_slots: int = 9
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 16
    max_model_len: int = 64

    @property
    def max_prompt_len(self) -> int:
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)

    def make_scheduler(self, kind: type[Scheduler] = Scheduler) -> Scheduler:
        config = SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enable_chunked_prefill=self.chunked,
            scheduling_policy=self.policy,
        )
        return kind(config, self.block_size, self.num_blocks, self.num_slots, self.max_model_len, EOS)


START = 1


def advance(state: int, token: int) -> int:
    """The recurrence: what one more token does to the state."""
    return (state * 1103515245 + token + 12345) % 2**31


def choose(state: int, history: list[int]) -> int:
    """The network: the next token from the state and from all tokens that attention sees."""
    attention = sum(position * token for position, token in enumerate(history, 1))
    return ((state * 2654435761 + attention * 40503) >> 8) % VOCABULARY


def generate_alone(setup: Setup, prompt: list[int], params: SamplingParams) -> tuple[list[int], str, int | None]:
    """Tokens, finish reason and stop reason of a request that has the device to itself, with no scheduler at all."""
    tokens, state = list(prompt), START
    for token in tokens:
        state = advance(state, token)
    room = min(setup.max_model_len, setup.max_prompt_len + 1)
    while True:
        token = choose(state, tokens)
        tokens.append(token)
        state = advance(state, token)
        output = tokens[len(prompt) :]
        if len(output) >= params.min_tokens and token in EOS and not params.ignore_eos:
            return output, "stop", None
        if len(output) >= params.min_tokens and token in params.stop_token_ids:
            return output, "stop", token
        if len(output) == params.max_tokens or len(tokens) >= room:
            return output, "length", None


@dataclass
class _Row:
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[int]
    state_slot: int
    num_computed: int
    wants_prompt_logprobs: bool
    wants_logprobs: bool


class FakeWorker:
    """Executes steps one after the other."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.pages: list[list[int | None]] = [[None] * setup.block_size for _ in range(setup.num_blocks)]
        self.states: list[int | None] = [None] * setup.num_slots
        self.rows: dict[str, _Row] = {}

    @property
    def num_pages_held(self) -> int:
        return sum(len(row.block_ids) for row in self.rows.values())

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self._forget(step)
        self._add_rows(step)
        self._append_pages(step)
        self._check_ownership()
        self._check_limits(step)
        output = ModelRunnerOutput()
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            self._compute(request_id, num_tokens, output)
        return output

    def _forget(self, step: SchedulerOutput) -> None:
        for request_id in step.finished_request_ids:
            require(request_id in self.rows, f"told to forget {request_id}, which has no row")
            row = self.rows.pop(request_id)
            for page in row.block_ids:
                self.pages[page] = [None] * self.setup.block_size
            self.states[row.state_slot] = None

    def _add_rows(self, step: SchedulerOutput) -> None:
        for new in step.new_requests:
            require(new.request_id not in self.rows, f"{new.request_id} is new but has a row")
            require(new.request_id in step.num_scheduled_tokens, f"{new.request_id} is new but not scheduled")
            require(new.num_computed_tokens == 0, f"{new.request_id} starts with tokens that nobody computed")
            params = new.sampling_params
            self.rows[new.request_id] = _Row(
                token_ids=new.token_ids,
                num_prompt_tokens=new.num_prompt_tokens,
                block_ids=new.block_ids,
                state_slot=new.state_slot,
                num_computed=new.num_computed_tokens,
                wants_prompt_logprobs=params.prompt_logprobs is not None,
                wants_logprobs=params.logprobs is not None,
            )

    def _append_pages(self, step: SchedulerOutput) -> None:
        new_ids = {new.request_id for new in step.new_requests}
        for request_id, block_ids in step.new_block_ids.items():
            require(request_id in self.rows, f"pages for {request_id}, which has no row")
            require(request_id not in new_ids, f"pages for {request_id} twice")
            self.rows[request_id].block_ids += block_ids

    def _check_ownership(self) -> None:
        for request_id, row in self.rows.items():
            require(all(0 < page < self.setup.num_blocks for page in row.block_ids), f"{request_id}: no such page")
            require(len(set(row.block_ids)) == len(row.block_ids), f"{request_id} has a page twice")
            require(0 < row.state_slot < self.setup.num_slots, f"{request_id}: no such slot")
        for (a, row_a), (b, row_b) in combinations(self.rows.items(), 2):
            require(not set(row_a.block_ids) & set(row_b.block_ids), f"{a} and {b} share a page")
            require(row_a.state_slot != row_b.state_slot, f"{a} and {b} share a slot")
            require(row_a.token_ids is not row_b.token_ids, f"{a} and {b} share a list")

    def _check_limits(self, step: SchedulerOutput) -> None:
        scheduled = step.num_scheduled_tokens
        require(set(scheduled) <= set(self.rows), "a sequence without a row is scheduled")
        require(all(n >= 1 for n in scheduled.values()), "a sequence is scheduled for no token")
        require(step.total_num_scheduled_tokens <= self.setup.max_num_batched_tokens, "token budget exceeded")
        require(len(self.rows) <= self.setup.max_num_seqs, "too many sequences")
        is_decode = [n == 1 and self.rows[request_id].num_computed > 0 for request_id, n in scheduled.items()]
        require(is_decode == sorted(is_decode, reverse=True), "decode rows do not come first")
        if not self.setup.chunked:
            for request_id, n in scheduled.items():
                row = self.rows[request_id]
                require(row.num_computed + n == len(row.token_ids), f"{request_id} is cut into chunks")

    def _compute(self, request_id: str, num_tokens: int, output: ModelRunnerOutput) -> None:
        row = self.rows[request_id]
        start, end = row.num_computed, row.num_computed + num_tokens
        require(end <= len(row.token_ids), f"{request_id} is to compute tokens that are not known yet")
        require(end <= len(row.block_ids) * self.setup.block_size, f"{request_id} has tokens without a page")
        for position in range(start, end):
            self._compute_token(row, position)
        row.num_computed = end
        if row.wants_prompt_logprobs and start < row.num_prompt_tokens - 1:
            scored = range(start + 1, min(end, row.num_prompt_tokens - 1) + 1)
            output.prompt_logprobs[request_id] = [TokenLogprobs([row.token_ids[i]], [float(i)], 1) for i in scored]
        if end == len(row.token_ids):
            token = self._sample(row)
            row.token_ids.append(token)
            output.sampled_token_ids[request_id] = [token]
            if row.wants_logprobs:
                output.logprobs[request_id] = [TokenLogprobs([token], [float(end)], 1)]

    def _compute_token(self, row: _Row, position: int) -> None:
        state = START if position == 0 else self.states[row.state_slot]
        require(state is not None, "a state is read that nobody wrote")
        token = row.token_ids[position]
        self.states[row.state_slot] = advance(state, token)
        page, place = divmod(position, self.setup.block_size)
        self.pages[row.block_ids[page]][place] = token

    def _sample(self, row: _Row) -> int:
        cached = [token for page in row.block_ids for token in self.pages[page]][: row.num_computed]
        require(None not in cached, "attention reads what nobody wrote")
        return choose(self.states[row.state_slot], cached)
