"""modelfile.incremental: any chopping of a prompt gives the tokens of one whole call."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelfile import incremental, word_memo
from modelfile.boundaries import SAFE_BOUNDARY, WORDS
from modelfile.gguf_file import GgufFile
from modelfile.incremental import IncrementalTokenizer
from modelfile.tokenizer import TokenizedText, Tokenizer
from skim.errors import InvalidRequest
from tests.fixtures.llama_tokens import LlamaTokenizer
from tests.fixtures.tiny_gguf import telling_merges, write_tiny_gguf

Pair = tuple[Tokenizer, LlamaTokenizer]
CONTROL = re.compile(rb"<\|(?:endoftext|im_start|im_end)\|>")

# Every class of character that a pre-tokenizer tells apart, and what joins across them.
_PIECES = st.sampled_from(
    [
        *"aZs09 \t\n\r'.!_é\u0301Ж京あ한、。！😀\u00a0\u3000\x0b\x85",
        "'s", "'ll", "\r\n", "   ", " \n ", "\n\n", "... ", "the ", " reader", "4821", "!\n", "(a)",
        "<|im_end|>", "<|im_", "end|>", "<think>", "</think", "<|im_start|>user\n",
    ]
)  # fmt: skip
_TEXT = st.lists(_PIECES, max_size=30).map("".join)


@pytest.fixture(scope="module", params=["qwen2", "qwen35", "llama-bpe", "gpt-2", "default"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    path = tmp_path_factory.mktemp("tok") / "tiny.gguf"
    write_tiny_gguf(path, layers=1, pre=request.param, merges=telling_merges())
    with GgufFile.open(path) as gguf, LlamaTokenizer(path) as theirs:
        yield Tokenizer.from_gguf(gguf), theirs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_tiny_gguf(tmp_path_factory.mktemp("tok") / "tiny.gguf", layers=1)
    with GgufFile.open(path) as gguf:
        return Tokenizer.from_gguf(gguf)


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut wherever a cut is allowed at all."""
    monkeypatch.setattr(incremental, "PIECE_BYTES", 1)


def _reference(theirs: LlamaTokenizer, text: bytes, control: list[tuple[int, int]]) -> list[int]:
    """llama.cpp's tokens: control tokens inside the ranges, all between them plain text."""
    ids: list[int] = []
    start = 0
    for found in CONTROL.finditer(text):
        begin, end = found.span()
        if any(low <= begin and end <= high for low, high in control):
            ids += theirs.encode(text[start:begin])
            ids += theirs.encode(text[begin:end], parse_special=True)
            start = end
    return ids + theirs.encode(text[start:])


def _chopped(tokenizer: Tokenizer, text: bytes, cuts: list[int]) -> TokenizedText:
    prompt = IncrementalTokenizer(tokenizer)
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        prompt.feed(text[begin:end])
    assert prompt.size_bytes == len(text)
    return prompt.finish()


@settings(max_examples=120, deadline=None)
@given(text=_TEXT, data=st.data())
@example(text="a  b", data=None)
@example(text="x\n\n y. \n z", data=None)
@example(text="don't 's 12 345 6", data=None)
@example(text="京、あ。 한! ", data=None)
@pytest.mark.usefixtures("tiny_pieces")
def test_any_chopping_gives_llama_cpps_tokens(
    pair: Pair, text: str, data: st.DataObject | None
) -> None:
    ours, theirs = pair
    raw = text.encode()
    cuts = list(range(len(raw)))
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    encoded = _chopped(ours, raw, cuts)
    assert encoded.ids.tolist() == theirs.encode(raw)
    assert encoded.ends.tolist() == ours.encode(raw).ends.tolist()


@settings(max_examples=120, deadline=None)
@given(parts=st.lists(st.tuples(_TEXT, st.booleans()), max_size=6))
@pytest.mark.usefixtures("tiny_pieces")
def test_control_parts_give_the_tokens_of_their_ranges(
    pair: Pair, parts: list[tuple[str, bool]]
) -> None:
    ours, theirs = pair
    raw = b"".join(text.encode() for text, _ in parts)
    ranges: list[tuple[int, int]] = []
    arriving, offset = IncrementalTokenizer(ours), 0
    for text, control in parts:
        part = text.encode()
        arriving.feed(part, control=control)
        if control:
            ranges.append((offset, offset + len(part)))
        offset += len(part)
    joined: list[tuple[int, int]] = []
    for begin, end in ranges:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    expected = _reference(theirs, raw, joined)
    assert arriving.finish().ids.tolist() == expected
    known = IncrementalTokenizer(ours, ranges)
    known.feed(raw)
    assert known.finish().ids.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(text=_TEXT)
def test_words_are_gapless_and_begin_at_safe_boundaries(text: str) -> None:
    words = WORDS.findall(text)
    assert "".join(words) == text
    safe = {found.end() for found in SAFE_BOUNDARY.finditer(text.encode())}
    offset = 0
    for word in words[:-1]:
        offset += len(word.encode())
        assert offset in safe


def test_blind_cuts_would_change_the_tokens(tokenizer: Tokenizer) -> None:
    # What the safe boundaries are for: cutting this text at every byte changes its tokens.
    text = b"the  reader's  answer is 4821;\n\n\nwas"
    blind = [
        token
        for begin in range(0, len(text), 5)
        for token in tokenizer.encode(text[begin : begin + 5]).ids.tolist()
    ]
    assert blind != tokenizer.encode(text).ids.tolist()


def test_long_prompt_is_cut_into_pieces_on_several_threads(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(
        f"Line {n}: the keeper wrote, 京都。 It's {n * n}.\n" for n in range(4000)
    ).encode()
    sizes: list[int] = []
    names: set[str] = set()
    encode_piece = Tokenizer.encode_piece

    def recording(self: Tokenizer, piece: bytes, *rest: object) -> object:
        sizes.append(len(piece))
        names.add(threading.current_thread().name)
        return encode_piece(self, piece, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Tokenizer, "encode_piece", recording)
    whole = tokenizer.encode(text)
    assert sum(sizes) == len(text)
    assert len(sizes) > 5
    assert max(sizes) < incremental.PIECE_BYTES + 100
    assert threading.main_thread().name not in names
    sizes.clear()
    _chopped(tokenizer, text, list(range(1000, len(text), 1000)))
    assert sum(sizes) == len(text)
    assert max(sizes) < incremental.PIECE_BYTES + 1100
    monkeypatch.undo()
    for step in (1000, 16 * 1024, 100_000):
        chopped = _chopped(tokenizer, text, list(range(step, len(text), step)))
        assert chopped.ids.tolist() == whole.ids.tolist()
        assert chopped.ends.tolist() == whole.ends.tolist()


def test_pieces_are_tokenised_before_the_prompt_has_ended(tokenizer: Tokenizer) -> None:
    prompt = IncrementalTokenizer(tokenizer)
    prompt.feed(b"the keeper wrote " * 2000)
    assert [piece.result(timeout=30) for piece in prompt._pieces]
    prompt.feed(b"and went to bed")
    assert len(prompt.finish()) > 2000


@pytest.mark.parametrize("unit", ["a", "é", " ", "\n", "1", "ก", "!", "\u3000"])
def test_text_without_safe_boundary_is_still_right(tokenizer: Tokenizer, unit: str) -> None:
    text = (unit * 40_000).encode()
    cuts = list(range(777, len(text), 5000))
    encoded = _chopped(tokenizer, text, cuts)
    expected, _ = tokenizer.encode_piece(text, 0, ())
    assert encoded.ids.tolist() == expected.tolist()


def test_searching_for_a_boundary_starts_where_the_last_search_ended(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many small parts without a boundary: each byte may be searched only a few times.
    searched = 0

    class Counting:
        def search(self, text: bytearray, start: int) -> re.Match[bytes] | None:
            nonlocal searched
            searched += len(text) - start
            return SAFE_BOUNDARY.search(text, start)

    prompt = IncrementalTokenizer(tokenizer)
    monkeypatch.setattr(incremental, "SAFE_BOUNDARY", Counting())
    for _ in range(500):
        prompt.feed("กขคง".encode() * 20)
    assert searched < 3 * prompt.size_bytes


def test_a_cut_never_falls_inside_a_special_token_with_a_boundary_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incremental, "PIECE_BYTES", 1)
    path = write_tiny_gguf(tmp_path / "odd.gguf", layers=1)
    content = path.read_bytes()
    content = content.replace(b"<|im_start|>", b"<a b. c d e>").replace(b"</think>", b"x y z, w")
    path.write_bytes(content)
    with GgufFile.open(path) as gguf, LlamaTokenizer(path) as theirs:
        ours = Tokenizer.from_gguf(gguf)
        plain = b"go x y z, w x y z, x y z, w <a b. c d e> <a b. c d <a b. c d e> x y z"
        for step in (1, 2, 3, 7, 100):
            cuts = list(range(step, len(plain), step))
            encoded = _chopped(ours, plain, cuts)
            assert encoded.ids.tolist() == theirs.encode(plain)
            prompt = IncrementalTokenizer(ours, [(0, len(plain))])
            for begin in range(0, len(plain), step):
                prompt.feed(plain[begin : begin + step])
            expected = theirs.encode(plain, parse_special=True)
            assert prompt.finish().ids.tolist() == expected


def test_invalid_utf8_names_its_offset_in_the_whole_prompt(tokenizer: Tokenizer) -> None:
    prompt = IncrementalTokenizer(tokenizer)
    prompt.feed(b"the keeper wrote " * 3000)
    prompt.feed(b"and \xff then ")
    prompt.feed(b"the keeper wrote " * 3000)
    with pytest.raises(InvalidRequest) as refused:
        prompt.finish()
    assert refused.value.metadata["offset"] == str(17 * 3000 + 4)


def test_code_point_cut_between_parts_is_whole_again(tokenizer: Tokenizer) -> None:
    text = "😀京é".encode() * 3
    encoded = _chopped(tokenizer, text, list(range(1, len(text))))
    assert encoded.ids.tolist() == tokenizer.encode(text).ids.tolist()


def test_control_range_past_the_end_is_refused_at_the_end(tokenizer: Tokenizer) -> None:
    prompt = IncrementalTokenizer(tokenizer, [(0, 100)])
    prompt.feed(b"short")
    with pytest.raises(InvalidRequest, match="control_ranges"):
        prompt.finish()


def test_ranges_known_up_front_cannot_be_added_to(tokenizer: Tokenizer) -> None:
    prompt = IncrementalTokenizer(tokenizer, [(0, 1)])
    with pytest.raises(ValueError, match="up front"):
        prompt.feed(b"a", control=True)


def test_cancel_drops_waiting_pieces(tokenizer: Tokenizer) -> None:
    release = threading.Event()
    blockers = [tokenizer.pool.submit(release.wait, 30) for _ in range(8)]
    prompt = IncrementalTokenizer(tokenizer)
    prompt.feed(b"the keeper wrote " * 5000)
    prompt.cancel()
    assert all(piece.cancelled() for piece in prompt._pieces)
    release.set()
    assert all(blocker.result(timeout=30) for blocker in blockers)


def test_word_memo_starts_anew_when_full(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_memo, "_MAX_WORDS", 50)
    texts = [f"w{n} x{n}, y{n}. {'z' * n}".encode() for n in range(100)]
    first = [tokenizer.encode(text).ids.tolist() for text in texts]
    assert len(tokenizer._memo._memo) <= 60
    assert [tokenizer.encode(text).ids.tolist() for text in texts] == first
