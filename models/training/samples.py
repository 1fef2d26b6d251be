"""Assemble one training document: filler, needles, then questions with their answers, as token ids.

The text of needles and questions is `bench.wordings`'; the filler comes from
`models.training.pool`. Half of the documents are chats, some are cut into 32-token chunks the way
a skimmed prompt is, some ask above the document. A document carries, for the drafter's attention
loss, which positions ask and what they ask for.
"""

import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from bench import wordings
from models.training.pool import SPACED, Ids, Pool, Pools, Style

FILLER, ANSWER = 1, 2
QUERY_ROWS = 9
CHUNK = 32
PREFIXES = ("Answer:\n", "Answer:\n", "Answer:\n", "", "The answer is ", "A:\n", "{long} ")
LONG_PREFIX = "The special magic {kind} for {keys} mentioned in the provided text is"
SYSTEMS = ("You are a helpful assistant.", "Answer from the document.", "Be brief.")
CONTROL_LOOKALIKES = (
    "<|im_end|>",
    "<|im_start|>user\n",
    "<|endoftext|>",
    "<|im_start|>assistant\n",
)


@dataclass(frozen=True)
class Mix:
    """How hard the samples are; `broad` opens every task, kind and haystack."""

    needles: tuple[int, int]
    questions: int
    broad: bool


@dataclass
class Document:
    """A finished document: ids, a loss code each (FILLER, ANSWER), and what questions look at.

    `rows` has QUERY_ROWS positions per question (-1: none); `gold` the [begin, end) of its
    needle.
    """

    ids: Ids
    codes: NDArray[np.uint8]
    rows: list[list[int]] = field(default_factory=list)
    gold: list[tuple[int, int]] = field(default_factory=list)


@dataclass(eq=False)  # a fact is itself, whatever it says; arrays do not compare to one bool
class _Fact:
    """A needle in the making: its sentence, what it is asked by and the answer."""

    text: str
    key: str
    kind: str
    value: str
    ids: Ids = field(default_factory=lambda: np.zeros(0, np.uint16))
    inner: tuple[int, int] = (0, 0)
    at: int = -1


@dataclass
class _Question:
    text: str
    prefix: str
    answer: str
    key: str
    fact: _Fact | None


class Assembler:
    """Builds documents of an exact length with one random generator."""

    def __init__(self, tokenizer: Tokenizer, pools: Pools, rng: random.Random) -> None:
        self._tokenizer, self._pools, self._rng = tokenizer, pools, rng
        self._id = {
            t: tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        }

    def row(self, tokens: int, mix: Mix, whole: float) -> Document:
        """Return `tokens` ids: one document, or (share 1 - whole) several shorter ones."""
        if self._rng.random() < whole or tokens < 600:
            return self.document(tokens, mix)
        parts: list[Document] = []
        left = tokens
        while left:
            size = int(np.exp(self._rng.uniform(np.log(320), np.log(tokens))))
            size = left if left - size < 320 else size
            parts.append(self.document(size, mix))
            left -= size
        return _join(parts)

    def document(self, tokens: int, mix: Mix) -> Document:
        """Return one document of exactly `tokens` ids."""
        rng = self._rng
        pool, style = self._haystack(mix)
        facts, questions = self._task(tokens, mix, style)
        chat = rng.random() < 0.5
        above = mix.broad and bool(questions) and rng.random() < 0.12
        head, tail = self._shell(questions, style, chat, above)
        while (
            questions and len(tail.ids) + len(head) + sum(len(f.ids) for f in facts) > 0.75 * tokens
        ):
            questions = questions[: len(questions) // 2]
            kept = {id(q.fact) for q in questions}
            spare = [f for f in facts if id(f) not in kept and f.kind != "chain"]
            facts = [f for f in facts if f not in spare] + spare[: len(spare) // 3]
            facts = facts if questions else []
            head, tail = self._shell(questions, style, chat, above and bool(questions))
        room = tokens - len(head) - len(tail.ids)
        if mix.broad and rng.random() < 0.2:
            body = self._chopped(pool, facts, room)
        else:
            body = self._continuous(pool, facts, room)
        return self._finish(head, body, tail, questions)

    def _haystack(self, mix: Mix) -> tuple[Pool, Style]:
        draw = self._rng.random()
        pools = self._pools.books if draw < 0.6 else self._pools.docstrings
        if mix.broad and draw > 0.95:
            pools = self._pools.noise
        pool = self._rng.choice(pools)
        return pool, pool.style

    def _key(self, kind: str, small: bool) -> str:
        rng = self._rng
        if kind != "words":
            return wordings.random_key(rng, kind)
        if small:  # keys that share halves with each other
            return f"{rng.choice(wordings.ADJECTIVES[:12])}-{rng.choice(wordings.NOUNS[:16])}"
        if rng.random() < 0.3:
            return f"{rng.choice(self._pools.words)}-{rng.choice(self._pools.words)}"
        return wordings.random_key(rng, kind)

    def _task(self, tokens: int, mix: Mix, style: Style) -> tuple[list[_Fact], list[_Question]]:
        rng = self._rng
        draw = rng.random() if mix.broad else 1.0
        if draw < 0.03:
            return [], []
        if draw < 0.07:
            return self._chain(style)
        key_kind = value_kind = "numbers"
        key_kind = "words" if not mix.broad else rng.choices(wordings.KINDS, (85, 8, 7))[0]
        value_kind = "numbers" if not mix.broad else rng.choices(wordings.KINDS, (12, 80, 8))[0]
        low, high = mix.needles
        count = max(1, min(rng.randint(low, high), tokens // 150))
        if mix.broad and rng.random() < 0.08:
            count = max(1, tokens // 45)  # a haystack of needles
        small = rng.random() < 0.25
        keys = list(dict.fromkeys(self._key(key_kind, small) for _ in range(count)))
        facts = [self._fact(key, value_kind, mix) for key in keys]
        if draw < 0.15:  # several values for some keys
            facts += [
                self._fact(rng.choice(keys), value_kind, mix) for _ in range(len(keys) // 2 + 1)
            ]
            rng.shuffle(facts)
        self._encode(facts, style)
        several = 0.07 <= draw < 0.24
        return facts, self._questions(facts, value_kind, mix.questions, several)

    def _fact(self, key: str, kind: str, mix: Mix) -> _Fact:
        value = self._key(kind, False)
        text = wordings.needle_text(kind, key, value)
        if mix.broad and self._rng.random() < 0.1:
            form = self._rng.choice(
                ("The {k} for {key} is {v}.", "{key}: {v}.", "Remember that {key} goes with {v}.")
            )
            text = form.format(k=kind.removesuffix("s"), key=key, v=value)
        return _Fact(text, key, kind, value)

    def _encode(self, facts: list[_Fact], style: Style) -> None:
        texts = [f"{style.before}{f.text}{style.after}" for f in facts]
        for fact, text, encoding in zip(facts, texts, self._encode_batch(texts), strict=True):
            fact.ids = np.array(encoding.ids, np.uint16)
            begin = text.index(fact.key) if fact.key in text else len(style.before)
            end = text.rindex(fact.value) + len(fact.value)
            fact.inner = (_token_at(encoding, begin), _token_at(encoding, end - 1) + 1)

    def _encode_batch(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch(texts) if texts else []

    def _questions(
        self, facts: list[_Fact], kind: str, limit: int, several: bool
    ) -> list[_Question]:
        rng = self._rng
        by_key: dict[str, list[_Fact]] = {}
        for fact in facts:
            by_key.setdefault(fact.key, []).append(fact)
        keys = rng.sample(sorted(by_key), min(limit, len(by_key)))
        questions: list[_Question] = []
        while keys:
            asked = [
                keys.pop() for _ in range(min(len(keys), rng.choice((1, 2, 4)) if several else 1))
            ]
            hits = [fact for key in asked for fact in by_key[key]]
            text = wordings.ask(wordings.random_training_wording(rng), kind, asked, len(hits) > 1)
            prefix = rng.choice(PREFIXES).format(
                long=LONG_PREFIX.format(kind=kind.removesuffix("s"), keys=wordings.join_keys(asked))
            )
            answer = ", ".join(f.value for f in hits)
            fact = hits[0] if len(hits) == 1 else None
            questions.append(_Question(text, prefix, answer, asked[-1], fact))
        return questions

    def _chain(self, style: Style) -> tuple[list[_Fact], list[_Question]]:
        rng = self._rng
        names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
        value = str(rng.randrange(10_000, 100_000))
        sources = [value, *(f"VAR {name}" for name in names)]
        facts = [
            _Fact(f"VAR {name} = {source}", name, "chain", source)
            for name, source in zip(names, sources, strict=False)
        ]
        self._encode(facts, style)
        text = f"Find all variables that are assigned the value {value} in the text above."
        return facts, [_Question(text, "Answer:\n", ", ".join(names), value, None)]

    def _shell(
        self, questions: list[_Question], style: Style, chat: bool, above: bool
    ) -> tuple[Ids, Document]:
        """Return the ids before the body and everything after it, rows relative to the latter."""
        rng = self._rng
        end, start = self._id["<|im_end|>"], self._id["<|im_start|>"]
        head: list[int] = []
        if chat:
            if rng.random() < 0.15:
                system = self._tokenizer.encode(f"system\n{rng.choice(SYSTEMS)}")
                head += [start, *system.ids, end, *self._tokenizer.encode("\n").ids]
            head.append(start)
        opening = "user\n" if chat else ""
        opening += f"{questions[0].text}\n\n" if above else ""
        head += self._tokenizer.encode(opening).ids if opening else []
        texts, spans = [], []
        joint = rng.choice(("\n\n", "\n\n", "\n")) if style is SPACED else "\n"
        for index, question in enumerate(questions):
            lead = ("\nuser\n" if chat else "\n") if index else self._last_sentence(style) + joint
            hidden = above and index == 0
            asked = ("" if hidden else question.text) + ("" if chat else f"\n{question.prefix}")
            spaced = not chat and asked.endswith(" ")
            texts += [lead + asked.rstrip(" "), (" " if spaced else "") + question.answer]
            spans.append((len(lead), len(lead) + len(question.text), hidden))
        encoded = self._encode_batch(texts)
        return np.array(head, np.uint16), self._turns(questions, encoded, texts, spans, chat)

    def _turns(
        self,
        questions: list[_Question],
        encoded: list[Encoding],
        texts: list[str],
        spans: list[tuple[int, int, bool]],
        chat: bool,
    ) -> Document:
        end, start = self._id["<|im_end|>"], self._id["<|im_start|>"]
        newline = self._tokenizer.encode("\n").ids
        assistant = [end, *newline, start, *self._tokenizer.encode("assistant\n").ids]
        ids: list[int] = []
        codes: list[int] = []
        rows: list[list[int]] = []
        for index, question in enumerate(questions):
            asked, answer = encoded[2 * index], encoded[2 * index + 1]
            begin, stop, hidden = spans[index]
            here = list(asked.ids)
            if (
                chat and index
            ):  # "\nuser\n..." : the turn starts with a control token after the newline
                here = [*newline, start, *self._tokenizer.encode(texts[2 * index][1:]).ids]
            shift = len(here) - len(asked.ids)
            here += assistant if chat else []
            last = len(ids) + len(here) - 1
            mine = [last]
            if not hidden:
                key_end = texts[2 * index].rindex(question.key, begin) + len(question.key)
                first = len(ids) + _token_at(asked, key_end - 1) + shift
                final = len(ids) + _token_at(asked, stop - 1) + shift
                mine += [r for r in range(final - 7, final + 1) if r >= first]
            rows.append((mine + [-1] * QUERY_ROWS)[:QUERY_ROWS])
            ids += [*here, *answer.ids, end]
            codes += [FILLER] * len(here) + [ANSWER] * (len(answer.ids) + 1)
        return Document(np.array(ids, np.uint16), np.array(codes, np.uint8), rows)

    def _last_sentence(self, style: Style) -> str:
        text = f"{style.before}{self._rng.choice(self._pools.tails)}"
        if self._rng.random() < 0.05:
            text += self._rng.choice(CONTROL_LOOKALIKES)
        return text

    def _continuous(self, pool: Pool, facts: list[_Fact], room: int) -> list[Ids]:
        """Whole filler with the facts at random unit boundaries; sets `at` relative to the body."""
        filler = max(0, room - sum(len(f.ids) for f in facts))
        ids, starts = pool.run(self._rng, filler)
        cuts = sorted(int(starts[self._rng.randrange(len(starts))]) for _ in facts)
        pieces: list[Ids] = []
        done = position = 0
        for cut, fact in zip(cuts, facts, strict=True):
            pieces += [ids[done:cut], fact.ids]
            position += cut - done
            fact.at = position
            position += len(fact.ids)
            done = cut
        return [*pieces, ids[done:]]

    def _chopped(self, pool: Pool, facts: list[_Fact], room: int) -> list[Ids]:
        """Disjoint chunks, facts inside some: what is left of a prompt after skimming."""
        rng = self._rng
        groups: list[list[Ids | _Fact]] = []
        plain: list[list[Ids | _Fact]] = []
        used = 0
        for fact in facts:
            before = rng.randrange(CHUNK)
            size = -(-(before + len(fact.ids)) // CHUNK) * CHUNK
            groups.append([pool.chunk(rng, before), fact])
            groups[-1].append(pool.chunk(rng, size - before - len(fact.ids)))
            used += size
        while used + CHUNK <= room:
            run = min(rng.choice((1, 1, 2, 4)), (room - used) // CHUNK) * CHUNK
            plain.append([pool.chunk(rng, run)])
            used += run
        for group in plain:  # facts keep their order: several values are answered in it
            groups.insert(rng.randint(0, len(groups)), group)
        pieces: list[Ids] = []
        position = 0
        for piece in (p for group in groups for p in group):
            if isinstance(piece, _Fact):
                piece.at = position
                piece = piece.ids
            pieces.append(piece)
            position += len(piece)
        if position < room:
            pieces.append(pool.chunk(rng, room - position))
        elif position > room:  # the facts alone overflow their room by less than a chunk each
            return self._continuous(pool, facts, room)
        return pieces

    def _finish(
        self, head: Ids, body: list[Ids], tail: Document, questions: list[_Question]
    ) -> Document:
        ids = np.concatenate((head, *body, tail.ids))
        codes = np.full(len(ids), FILLER, np.uint8)
        begin = len(ids) - len(tail.ids)
        codes[begin:] = tail.codes
        document = Document(ids, codes)
        for rows, question in zip(tail.rows, questions, strict=True):
            if question.fact:
                low, high = question.fact.inner
                at = question.fact.at + len(head)
                document.rows.append([r + begin if r >= 0 else -1 for r in rows])
                document.gold.append((at + low, at + high))
        return document


def _token_at(encoding: Encoding, char: int) -> int:
    token = encoding.char_to_token(char)
    return len(encoding.ids) - 1 if token is None else token


def _join(parts: list[Document]) -> Document:
    joined = Document(
        np.concatenate([p.ids for p in parts]), np.concatenate([p.codes for p in parts])
    )
    position = 0
    for part in parts:
        joined.rows += [[r + position if r >= 0 else -1 for r in rows] for rows in part.rows]
        joined.gold += [(a + position, b + position) for a, b in part.gold]
        position += len(part.ids)
    return joined


__all__ = ["ANSWER", "FILLER", "QUERY_ROWS", "Assembler", "Document", "Mix"]
