"""No part of a stop text leaves, wherever tokens cut it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from target_svc.stop_text import StopText


def run(stops: list[str], pieces: list[str], last: str = "") -> tuple[str, list[int], bool]:
    """Push pieces as tokens 0, 1, 2, ...; give all text, tokens and whether it stopped."""
    held = StopText[int](stops)
    text, tokens, stopped = "", [], False
    for number, piece in enumerate(pieces):
        released = held.push(number, piece)
        text += released.text
        tokens += released.tokens
        stopped = released.stopped
        if stopped:
            return text, tokens, True
    released = held.finish(last)
    return text + released.text, tokens + released.tokens, released.stopped


def test_text_without_stops_leaves_at_once() -> None:
    released = StopText[int]().push(3, "hello")
    assert (released.text, released.tokens, released.stopped) == ("hello", [3], False)


def test_stop_inside_one_token_cuts_the_token_s_text_there() -> None:
    assert run(["END"], ["so ENDing"]) == ("so ", [0], True)


def test_stop_across_tokens_never_leaks_its_first_characters() -> None:
    held = StopText[int](["<stop>"])
    assert held.push(0, "a <st").text == "a "
    assert held.push(1, "o").text == ""
    released = held.push(2, "p> b")
    assert (released.text, released.tokens, released.stopped) == ("", [0], True)


def test_held_text_leaves_when_it_turns_out_harmless() -> None:
    held = StopText[int](["<stop>"])
    first = held.push(0, "<sto")
    assert (first.text, first.tokens) == ("", [])
    second = held.push(1, "ry")
    assert (second.text, second.tokens) == ("<story", [0, 1])


def test_a_token_leaves_only_with_the_last_of_its_text() -> None:
    held = StopText[int](["xy"])
    assert held.push(0, "ax").tokens == []
    assert held.push(1, "b").tokens == [0, 1]


def test_a_token_that_completes_no_code_point_waits_for_nothing() -> None:
    held = StopText[int](["xy"])
    assert held.push(0, "").tokens == [0]


def test_held_text_belongs_to_the_answer_when_the_answer_ends() -> None:
    assert run(["<stop>"], ["a", "<st"]) == ("a<st", [0, 1], False)


def test_the_decoder_s_last_text_can_complete_a_stop() -> None:
    assert run(["a\ufffd"], ["ba"], last="\ufffd") == ("b", [0], True)


def test_the_stop_that_completes_first_wins() -> None:
    assert run(["bcde", "cd"], ["abcdef"]) == ("ab", [0], True)


def test_of_two_stops_complete_at_once_the_longer_goes() -> None:
    assert run(["bcd", "cd"], ["abcdef"]) == ("a", [0], True)


def test_a_stop_that_overlaps_itself_is_found() -> None:
    assert run(["aab"], ["a", "a", "a", "b"]) == ("a", [0], True)


def test_tokens_of_the_stop_text_are_dropped() -> None:
    assert run(["STOP"], ["x", "ST", "OP", "y"]) == ("x", [0], True)


def test_nothing_follows_a_stop() -> None:
    held = StopText[int](["."])
    assert held.push(0, "a.").stopped
    after = held.push(1, "b")
    assert (after.text, after.tokens, after.stopped) == ("", [], True)
    assert held.finish("c").text == ""


ALPHABET = st.sampled_from("ab.")


@given(
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4),
    text=st.text(ALPHABET, max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=10),
)
def test_any_cutting_gives_the_same_answer(stops: list[str], text: str, cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    answer, tokens, stopped = run(stops, pieces)
    letter_by_letter, _, stopped_there = run(stops, list(text))
    assert (answer, stopped) == (letter_by_letter, stopped_there)
    assert text.startswith(answer) and not any(stop in answer for stop in stops)
    assert stopped or answer == text
    assert tokens == list(range(len(tokens)))
    written = "".join(pieces[: len(tokens)])
    assert written.startswith(answer)
