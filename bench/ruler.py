"""Generate retrieval tasks in the manner of RULER (arXiv 2404.06654), from its description.

Feeds the training data, `bench.retrieval` and the tests. A sample is text and byte ranges; no
model, no tokenizer and no array is needed but the caller's `count_tokens`. Tasks: niah_single,
niah_multikey (16 keys), niah_multivalue, niah_multiquery and vt (variable tracking); haystacks:
noise, prose, needle.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from bench import wordings
from bench.wordings import KINDS, NOISE, PLAIN, TEST_WORDINGS
from skim.demo_document import collect_sentences
from skim.errors import InvalidRequest

CountTokens = Callable[[str], int]
Range = tuple[int, int]

TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt")
HAYSTACKS = ("noise", "prose", "needle")
WORDINGS = {"plain": PLAIN, **TEST_WORDINGS}
VT_HOPS = 4
VT_QUESTION = "Find all variables that are assigned the value {value} in the text above."


@dataclass(frozen=True)
class RulerSpec:
    """What to generate; `depth_range` bounds the asked needles' place (shares of the document)."""

    task: str = "niah_single"
    haystack: str = "prose"
    key_kind: str = "words"
    value_kind: str = "numbers"
    wording: str = "plain"
    question_above: bool = False
    depth_range: tuple[float, float] = (0.0, 1.0)
    keys: int = 16
    values: int = 4
    queries: int = 4

    def __post_init__(self) -> None:
        _require("task", self.task, TASKS)
        _require("haystack", self.haystack, HAYSTACKS)
        _require("key_kind", self.key_kind, KINDS)
        _require("value_kind", self.value_kind, KINDS)
        _require("wording", self.wording, tuple(WORDINGS))
        low, high = self.depth_range
        if not 0 <= low < high <= 1:
            raise InvalidRequest.field_value(
                "depth_range", self.depth_range, "0 <= low < high <= 1"
            )
        if min(self.keys, self.values, self.queries) < 1:
            raise InvalidRequest.field_value("keys, values, queries", self, "at least 1")


@dataclass(frozen=True)
class RulerSample:
    """One task instance. All ranges are UTF-8 byte ranges of `content`, and so of `prompt` too."""

    document: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    content: str
    gold: tuple[Range, ...]
    query: Range

    @property
    def prompt(self) -> str:
        """The raw (completion) form: the content, then the start of the answer."""
        return f"{self.content}\n{self.answer_prefix}"

    def messages(self) -> list[dict[str, str]]:
        """Return the chat form: document and question in one user turn."""
        return [{"role": "user", "content": self.content}]

    def score(self, output: str) -> float:
        """Return the share of expected answers found in `output` (RULER's string_match_all)."""
        text = output.lower()
        return sum(a.lower() in text for a in self.answers) / len(self.answers)


@dataclass(frozen=True)
class _Needle:
    """A sentence to hide; `parts` are the character ranges of key and value in it."""

    text: str
    parts: tuple[Range, ...]
    asked: bool


def random_needle(rng: random.Random, key_kind: str = "words", value_kind: str = "numbers") -> str:
    """Return one needle sentence with a random key and value."""
    key, value = wordings.random_key(rng, key_kind), wordings.random_key(rng, value_kind)
    return wordings.needle_text(value_kind, key, value)


def build_sample(
    spec: RulerSpec,
    target_tokens: int,
    count_tokens: CountTokens,
    seed: int,
    reserve_tokens: int = 0,
) -> RulerSample:
    """Build one sample whose prompt has at most `target_tokens` tokens, within 1 % below.

    `reserve_tokens` is left free for what the caller adds (a chat template: 16). The same
    arguments give the same sample. Raises InvalidRequest when not even the needles and the
    question fit.
    """
    rng = random.Random(f"{spec.task}/{spec.haystack}/{seed}")
    needles, question, answers, kept_keys = _task(spec, rng)
    units = _Units(spec, rng, kept_keys, count_tokens)
    places = [rng.random() for _ in needles]
    budget = target_tokens - reserve_tokens

    def assemble(units_wanted: int) -> RulerSample:
        filler = units.take(units_wanted)
        return _assemble(spec, filler, needles, places, question, answers)

    return _fit(assemble, budget, count_tokens, units)


def _task(
    spec: RulerSpec, rng: random.Random
) -> tuple[list[_Needle], str, tuple[str, ...], set[str]]:
    if spec.task == "vt":
        return _variable_tracking(rng)
    multi = {"niah_multikey": spec.keys, "niah_multiquery": max(spec.queries, 1)}
    keys: list[str] = []
    while len(keys) < multi.get(spec.task, 1):
        key = wordings.random_key(rng, spec.key_kind)
        if key not in keys:
            keys.append(key)
    asked = keys[: spec.queries] if spec.task == "niah_multiquery" else keys[:1]
    per_key = spec.values if spec.task == "niah_multivalue" else 1
    needles, answers = [], []
    for key in keys:
        for _ in range(per_key):
            value = wordings.random_key(rng, spec.value_kind)
            needles.append(_needle(spec.value_kind, key, value, key in asked))
            answers += [value] if key in asked else []
    many = len(answers) > 1
    question = wordings.ask(WORDINGS[spec.wording], spec.value_kind, asked, many)
    return needles, question, tuple(answers), set(keys)


def _needle(kind: str, key: str, value: str, asked: bool) -> _Needle:
    text = wordings.needle_text(kind, key, value)
    at, to = text.index(key), text.rindex(value)
    return _Needle(text, ((at, at + len(key)), (to, to + len(value))), asked)


def _variable_tracking(
    rng: random.Random,
) -> tuple[list[_Needle], str, tuple[str, ...], set[str]]:
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(VT_HOPS + 1)]
    value = str(rng.randrange(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:], strict=False)]
    needles = [_Needle(line, ((0, len(line)),), True) for line in lines]
    return needles, VT_QUESTION.format(value=value), tuple(names), set()


class _Units:
    """An endless haystack, unit by unit, with each unit's token count remembered."""

    def __init__(
        self, spec: RulerSpec, rng: random.Random, taken: set[str], count_tokens: CountTokens
    ) -> None:
        self._spec, self._rng, self._taken = spec, rng, taken
        self._prose = _prose() if spec.haystack == "prose" else NOISE
        self._start = rng.randrange(len(self._prose)) if spec.haystack == "prose" else 0
        self._units: list[str] = []
        self.tokens_per_unit = max(1.0, count_tokens(" ".join(self.take(256))) / 256)

    def take(self, wanted: int) -> list[str]:
        """Return the first `wanted` units; a longer call extends a shorter one."""
        while len(self._units) < wanted:
            self._units.append(self._next())
        return self._units[:wanted]

    def _next(self) -> str:
        if self._spec.haystack != "needle":
            return self._prose[(self._start + len(self._units)) % len(self._prose)]
        while True:
            key = wordings.random_key(self._rng, self._spec.key_kind)
            if key not in self._taken:
                self._taken.add(key) if self._spec.key_kind != "words" else None
                value = wordings.random_key(self._rng, self._spec.value_kind)
                return wordings.needle_text(self._spec.value_kind, key, value)


@cache
def _prose() -> tuple[str, ...]:
    return collect_sentences()


def _assemble(
    spec: RulerSpec,
    filler: Sequence[str],
    needles: Sequence[_Needle],
    places: Sequence[float],
    question: str,
    answers: tuple[str, ...],
) -> RulerSample:
    joint = " " if spec.haystack == "prose" else "\n"
    low, high = spec.depth_range
    by_index: dict[int, list[_Needle]] = {}
    # A chain of variables stays in order; other needles keep the order of their own places.
    ordered = sorted(places) if spec.task == "vt" else list(places)
    for needle, place in zip(needles, ordered, strict=True):
        depth = low + place * (high - low) if needle.asked else place
        by_index.setdefault(round(depth * len(filler)), []).append(needle)
    head = f"{question}\n\n" if spec.question_above else ""
    pieces: list[str] = []
    gold: list[Range] = []
    position = len(head.encode())
    for index in range(len(filler) + 1):
        for needle in by_index.get(index, ()):
            gold += [_bytes(needle.text, part, position) for part in needle.parts if needle.asked]
            pieces.append(needle.text)
            position += len((needle.text + joint).encode())
        if index < len(filler):
            pieces.append(filler[index])
            position += len((filler[index] + joint).encode())
    document = joint.join(pieces)
    content = head + document if spec.question_above else f"{document}\n\n{question}"
    begin = 0 if spec.question_above else len(f"{document}\n\n".encode())
    query = (begin, begin + len(question.encode()))
    return RulerSample(document, question, "Answer:\n", answers, content, tuple(gold), query)


def _bytes(text: str, part: Range, offset: int) -> Range:
    begin = offset + len(text[: part[0]].encode())
    return begin, begin + len(text[part[0] : part[1]].encode())


def _fit(
    assemble: Callable[[int], RulerSample], budget: int, count_tokens: CountTokens, units: _Units
) -> RulerSample:
    """Search the number of filler units: the most whose prompt stays within `budget` tokens."""
    best, low, high = None, 0, None
    guess = int(budget / units.tokens_per_unit)
    for _ in range(40):
        sample = assemble(guess)
        size = count_tokens(sample.prompt)
        if size <= budget:
            best, low = sample, guess
        else:
            high = guess
        if (size <= budget and size > 0.995 * budget) or (high is not None and high - low <= 1):
            break
        step = round((0.998 * budget - size) / units.tokens_per_unit)
        guess += step if step else (1 if size <= budget else -1)
        guess = max(guess, low + 1 if best is not None else low)
        guess = guess if high is None else min(guess, high - 1)
    if best is None:
        raise InvalidRequest.field_value("target_tokens", budget, "enough for needles and question")
    return best


def _require(field: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise InvalidRequest.field_value(field, got, f"one of {', '.join(allowed)}")
