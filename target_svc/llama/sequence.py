"""One request inside the engine: what it asked, where it stands, what it cost.

Built by a lane when a Submit arrives, after `check_submit` refused what the model or the context
cannot take, so that no llama.cpp call is ever made with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from skim.errors import InvalidRequest, PreconditionFailed, PromptTooLong
from target_svc.llama.model import Model
from target_svc.messages import Done, DoneReason, Int32s, Submit, Tokens
from target_svc.sampling import Sampler, TokenLogprobs
from target_svc.speculative import Drafter, NgramDrafter, NoDrafter, Verdict

POSITION_MAX = 2**31 - 1


def check_submit(submit: Submit, model: Model, cells: int) -> None:
    """Refuse a request that llama.cpp would reject, or abort on.

    Args:
        cells: of the context it is meant for.
    Raises:
        InvalidRequest: empty, token ids out of range, positions not strictly increasing, bad
            sampling values.
        PreconditionFailed: positions with gaps on a model whose rope has none.
        PromptTooLong: more cells than the context has.
    """
    wrong = InvalidRequest.field_value
    if not len(submit.ids):
        raise wrong("ids", "none", "at least one token")
    if submit.max_tokens < 1:
        raise wrong("max_tokens", submit.max_tokens, ">= 1")
    for name, ids in (("ids", submit.ids), ("original_ids", submit.original_ids)):
        if len(ids) and (ids.min() < 0 or ids.max() >= model.n_vocab):
            raise wrong(name, (int(ids.min()), int(ids.max())), f"in [0, {model.n_vocab})")
    submit.sampling.check()
    needed = len(submit.ids) + submit.max_tokens
    if needed > cells:
        raise PromptTooLong(
            f"prompt and answer need {needed} cells, the context has {cells}",
            reason="CONTEXT_TOO_SMALL",
            got=needed,
            allowed=cells,
        )
    _check_positions(submit, model)


def _check_positions(submit: Submit, model: Model) -> None:
    positions, wrong = positions_of(submit), InvalidRequest.field_value
    if len(positions) != len(submit.ids):
        raise wrong("positions", len(positions), f"as many as ids: {len(submit.ids)}")
    if positions[0] < 0 or (len(positions) > 1 and int(np.diff(positions).min()) < 1):
        raise wrong("positions", "out of order", ">= 0 and strictly increasing")
    first_free = int(positions[-1]) + 1
    following = next_position_of(submit)
    if not first_free <= following <= POSITION_MAX - submit.max_tokens:
        raise wrong("next_position", following, f">= {first_free} and below 2^31 - max_tokens")
    contiguous = following - int(positions[0]) == len(positions)
    if not contiguous and not model.allows_gaps:
        raise PreconditionFailed(
            f"{model.architecture} ({model.rope_type} rope) takes no positions with gaps",
            reason="POSITIONS_NOT_SUPPORTED",
            field="positions",
            allowed="COMPACTED",
        )


def positions_of(submit: Submit) -> Int32s:
    """Positions of the prompt's tokens, int32 [n]; 0..n-1 when none were given."""
    if len(submit.positions):
        return submit.positions
    return np.arange(len(submit.ids), dtype=np.int32)


def next_position_of(submit: Submit) -> int:
    """Position of the first generated token."""
    return submit.next_position or int(positions_of(submit)[-1]) + 1


@dataclass(eq=False)
class Sequence:
    """The state of one running or waiting request."""

    submit: Submit
    stop_ids: frozenset[int]
    drafter: Drafter
    sampler: Sampler
    positions: Int32s
    next_position: int  # of the last emitted token, which is not in the KV cache yet
    slot: int = -1  # while it runs
    prefilled: int = 0
    last_token: int = -1  # emitted last
    output_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @classmethod
    def of(cls, submit: Submit, eog_ids: frozenset[int], *, can_draft: bool) -> Sequence:
        """Build the state of a request that `check_submit` let through."""
        prompt = submit.original_ids if len(submit.original_ids) else submit.ids
        draft = can_draft and submit.speculate
        stop_ids = frozenset(submit.stop_ids.tolist()) or eog_ids
        return cls(
            submit=submit,
            stop_ids=frozenset() if submit.ignore_eos else stop_ids,
            drafter=NgramDrafter(prompt, submit.max_tokens + 1) if draft else NoDrafter(),
            sampler=Sampler(submit.sampling),
            positions=positions_of(submit),
            next_position=next_position_of(submit),
        )

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    @property
    def cells(self) -> int:
        """KV cells it may come to hold; verify batches stay within it."""
        return len(self.submit.ids) + self.submit.max_tokens

    @property
    def prefilling(self) -> bool:
        return self.prefilled < len(self.submit.ids)

    def expired(self, now_s: float) -> bool:
        """Tell whether its deadline has passed."""
        deadline_s = self.submit.deadline_monotonic_s
        return deadline_s is not None and now_s >= deadline_s

    def draft(self, limit: int) -> Int32s:
        """Propose tokens for a verify batch; the bonus token counts against max_tokens too."""
        own = self.submit.draft_tokens or limit
        left = self.submit.max_tokens - self.output_tokens - 1
        return self.drafter.propose(min(limit, own, left))

    def take(self, verdict: Verdict, drafted: int) -> list[int]:
        """Note what a batch yielded; gives the tokens to send (a stop token is not sent)."""
        now_s = time.monotonic()
        if self.last_token < 0:
            self.first_token_s = now_s
        else:
            self.steps += 1
            self.next_position += len(verdict.emitted)
        self.last_token_s = now_s
        self.draft_tokens += drafted
        self.accepted_tokens += verdict.accepted
        self.last_token = verdict.emitted[-1]
        self.drafter.extend(verdict.emitted)
        sent = verdict.emitted[:-1] if verdict.stopped else verdict.emitted
        self.output_tokens += len(sent)
        return sent

    def tokens(self, ids: list[int], logprobs: list[TokenLogprobs]) -> Tokens:
        """Build the message for tokens of one step; `logprobs` is empty unless asked for."""
        message = Tokens(
            self.request_id,
            np.array(ids, np.int32),
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            steps=self.steps,
        )
        if not logprobs:
            return message
        return replace(
            message,
            logprobs=np.array([entry.chosen for entry in logprobs], np.float32),
            top_ids=np.concatenate([entry.top_ids for entry in logprobs]),
            top_logprobs=np.concatenate([entry.top_logprobs for entry in logprobs]),
        )

    def done(self, reason: DoneReason) -> Done:
        """Build the last message of an answer."""
        return Done(
            request_id=self.request_id,
            reason=reason,
            prompt_tokens=len(self.submit.ids),
            output_tokens=self.output_tokens,
            stop_id=self.last_token if reason == "stop" else -1,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            steps=self.steps,
            queue_s=self.started_s - self.submitted_s,
            prefill_s=self.first_token_s - self.started_s,
            decode_s=self.last_token_s - self.first_token_s,
            first_token_monotonic_s=self.first_token_s,
        )
