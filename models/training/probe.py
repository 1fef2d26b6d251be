"""What training watches: exact answers on held-out questions, and what the attention would keep.

Answers are checked by teacher forcing: when every answer token is the argmax given the true ones
before it, greedy decoding gives exactly this answer. Recall and density follow the drafter
service's rules in plain PyTorch (chunks of 32, pool 13, blocks of 128, alpha 0.1), only to steer
training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bench.ruler import RulerSpec, build_sample
from models.training.model import Qwen3

CHUNK, BLOCK, POOL = 32, 128, 13
SINK, WINDOW, LAST_FULL, ALPHA = 2, 4, 2, 0.1


@dataclass(frozen=True)
class Question:
    """One held-out sample: prompt and answer ids, the asking positions, the gold token ranges."""

    prompt: list[int]
    answer: list[int]
    asking: list[int]
    gold: list[tuple[int, int]]


def build_questions(
    tokenizer: Tokenizer, task: str, tokens: int, count: int, wording: str, seed: int
) -> list[Question]:
    """Build `count` chat samples over docstrings, each at most `tokens` long."""
    spec = RulerSpec(task=task, wording=wording, depth_range=(0.02, 0.97))

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    samples = [build_sample(spec, tokens, count_tokens, seed + i, 16) for i in range(count)]
    return [_question(tokenizer, s.content, s.answers[0], s.gold) for s in samples]


def _question(
    tokenizer: Tokenizer, content: str, answer: str, gold: Sequence[tuple[int, int]]
) -> Question:
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    head = [start, *tokenizer.encode("user\n").ids]
    body = tokenizer.encode(content)
    tail = [end, *tokenizer.encode("\n").ids, start, *tokenizer.encode("assistant\n").ids]
    prompt = [*head, *body.ids, *tail]
    last = len(head) + len(body.ids)
    # Gold is in bytes, the library counts characters.
    chars = [len(content.encode()[:b].decode()) for span in gold for b in span]
    tokens = [body.char_to_token(c - (i % 2)) or 0 for i, c in enumerate(chars)]
    ranges = [
        (a + len(head), b + 1 + len(head)) for a, b in zip(tokens[::2], tokens[1::2], strict=True)
    ]
    asking = [*range(last - 8, last), len(prompt) - 1]
    return Question(prompt, [*tokenizer.encode(answer).ids, end], asking, ranges)


@torch.no_grad()
def exact_share(model: Qwen3, questions: Sequence[Question], device: torch.device) -> float:
    """Return the share of questions whose whole answer is the argmax, token by token."""
    hits = 0
    for q in questions:
        ids = torch.tensor([q.prompt + q.answer], device=device)
        x = model(ids)[0, len(q.prompt) - 1 : -1]
        hits += bool((model.logits(x).argmax(-1) == ids[0, len(q.prompt) :]).all())
    return hits / max(1, len(questions))


@torch.no_grad()
def recall_and_density(
    model: Qwen3, questions: Sequence[Question], device: torch.device, keep: float
) -> tuple[float, float, float]:
    """Return gold recall with dense attention, recall of values alone, and mean natural density."""
    whole = values = 0
    densities: list[Tensor] = []
    for q in questions:
        rows: list[Tensor] = []

        def watch(
            _: int, query: Tensor, key: Tensor, rows: list[Tensor] = rows, q: Question = q
        ) -> None:
            rows.append(_row_attention(query[0], key[0], q.asking))
            densities.append(_density(query[0], key[0]))

        model(torch.tensor([q.prompt], device=device), watch)
        kept = _kept_chunks(torch.cat(rows), keep)
        inside = [
            all(c in kept for c in range(a // CHUNK, (b - 1) // CHUNK + 1)) for a, b in q.gold
        ]
        whole += all(inside)
        values += all(inside[1::2])
    total = max(1, len(questions))
    return whole / total, values / total, float(torch.stack(densities).mean())


def _row_attention(q: Tensor, k: Tensor, rows: list[int]) -> Tensor:
    """Return [heads, rows, tokens] causal softmax in float32."""
    index = torch.tensor(rows, device=q.device)
    scores = q[:, index].float() @ k.float().transpose(1, 2) / q.shape[-1] ** 0.5
    later = torch.arange(k.shape[1], device=q.device)[None] > index[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def _kept_chunks(attention: Tensor, keep: float) -> set[int]:
    """Pool, maximum over layers and heads, mean over queries; best chunks, 1 head, 4 tail."""
    pooled = F.avg_pool1d(attention, POOL, 1, POOL // 2, count_include_pad=False)
    scores = pooled.amax(0).mean(0)
    tokens = scores.shape[0]
    chunks = -(-tokens // CHUNK)
    means = F.pad(scores, (0, chunks * CHUNK - tokens)).view(chunks, CHUNK).mean(1)
    forced = {0, *range(chunks - 4, chunks)}
    order = means.argsort(descending=True).tolist()
    budget = int(keep * tokens / CHUNK) - len(forced)
    return forced | set([c for c in order if c not in forced][: max(0, budget)])


def _density(q: Tensor, k: Tensor) -> Tensor:
    """Return kept block pairs / causal block pairs of one layer under the FlashPrefill rule."""
    heads, tokens, width = k.shape
    blocks = -(-tokens // BLOCK)
    padded = F.pad(k.float(), (0, 0, 0, blocks * BLOCK - tokens)).view(heads, blocks, BLOCK, width)
    counts = torch.full((blocks,), BLOCK, device=k.device)
    counts[-1] = tokens - (blocks - 1) * BLOCK
    means = padded.sum(2) / counts[None, :, None]
    scores = q.float() @ means.transpose(1, 2) / width**0.5
    position = torch.arange(tokens, device=k.device)
    ends = torch.arange(blocks, device=k.device) * BLOCK + counts - 1
    scores = scores.masked_fill(position[None, :, None] < ends[None, None], float("-inf"))
    scores = F.pad(scores, (0, 0, 0, blocks * BLOCK - tokens), value=float("-inf"))
    tiles = scores.view(heads, blocks, BLOCK, blocks).logsumexp(2)
    row, column = (
        torch.arange(blocks, device=k.device)[:, None],
        torch.arange(blocks, device=k.device),
    )
    best = tiles.amax(-1, keepdim=True)
    keep = tiles >= best + torch.log(torch.tensor(ALPHA))
    keep |= (column < SINK) | (row - column < WINDOW) | (row >= blocks - LAST_FULL)
    causal = column <= row
    return (keep & causal).float().sum() / (causal.sum() * heads)
