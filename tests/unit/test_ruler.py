"""The task generator: ranges, fit, determinism, and words that must not be shared."""

import random
import re

import pytest

from bench import ruler, wordings
from bench.ruler import HAYSTACKS, TASKS, WORDINGS, RulerSpec, build_sample
from skim.demo_document import build_demo, collect_sentences
from skim.errors import InvalidRequest


def count_words(text: str) -> int:
    """A stand-in tokenizer: words and punctuation marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def gold_texts(sample: ruler.RulerSample) -> list[str]:
    data = sample.content.encode()
    return [data[begin:end].decode() for begin, end in sample.gold]


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("task", TASKS)
def test_prompt_fits_the_target_within_one_percent(task: str, haystack: str) -> None:
    sample = build_sample(RulerSpec(task, haystack), 4000, count_words, seed=1)
    assert 3960 <= count_words(sample.prompt) <= 4000


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_gold_ranges_cover_key_and_value_of_every_asked_needle(task: str, above: bool) -> None:
    sample = build_sample(RulerSpec(task, question_above=above), 3000, count_words, seed=2)
    texts = gold_texts(sample)
    if task == "vt":
        assert all(text.startswith("VAR ") for text in texts)
        assert len(texts) == len(sample.answers) == 5
    else:
        assert sorted(texts[1::2]) == sorted(sample.answers)
        assert all(key in sample.question for key in texts[0::2])


def test_gold_ranges_count_bytes_not_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "_prose", lambda: ("Ünïcödé sentences — 漢字.",) * 5)
    sample = build_sample(RulerSpec(), 600, count_words, seed=3)
    assert gold_texts(sample)[1] == sample.answers[0]


def test_query_range_is_the_question_above_and_below() -> None:
    for above in (False, True):
        sample = build_sample(RulerSpec(question_above=above), 1000, count_words, seed=4)
        begin, end = sample.query
        assert sample.content.encode()[begin:end].decode() == sample.question
        assert (begin == 0) == above


def test_same_seed_gives_the_same_sample_and_another_seed_another() -> None:
    spec = RulerSpec("niah_multikey")
    first, again, other = (build_sample(spec, 1500, count_words, seed=s) for s in (5, 5, 6))
    assert first == again
    assert first.answers != other.answers


def test_asked_needle_stays_inside_the_depth_range() -> None:
    for seed in range(20):
        spec = RulerSpec("niah_multikey", depth_range=(0.4, 0.5))
        sample = build_sample(spec, 2000, count_words, seed)
        place = sample.gold[0][0] / len(sample.document.encode())
        assert 0.3 < place < 0.6  # sentences differ in length: the range is in sentences


def test_multikey_hides_sixteen_distinct_keys() -> None:
    sample = build_sample(RulerSpec("niah_multikey"), 2000, count_words, seed=7)
    keys = re.findall(r"magic numbers for (\S+) is:", sample.document)
    assert len(keys) == len(set(keys)) == 16


def test_needle_haystack_never_repeats_the_asked_key() -> None:
    sample = build_sample(RulerSpec("niah_single", "needle"), 3000, count_words, seed=8)
    assert sample.document.count(f"for {gold_texts(sample)[0]} is:") == 1


def test_score_is_the_share_of_answers_found() -> None:
    sample = build_sample(RulerSpec("niah_multivalue"), 1000, count_words, seed=9)
    assert sample.score(f"they are {sample.answers[0]} and {sample.answers[1]}") == 0.5


@pytest.mark.parametrize("name", wordings.NO_SHARED_WORD)
def test_hard_wordings_share_no_word_with_the_needle_but_the_key(name: str) -> None:
    needle = set(re.findall(r"[a-z]+", wordings.NEEDLE.format(kind="numbers", key="", value="")))
    for text in (WORDINGS[name].one, WORDINGS[name].many):
        asked = set(re.findall(r"[a-z]+", text.replace("{keys}", "").lower()))
        assert not asked & {word.lower() for word in needle | {"one", "number"}}


def test_training_never_draws_a_test_wording() -> None:
    rng = random.Random(10)
    drawn = {wordings.random_training_wording(rng).one for _ in range(20_000)}
    assert not drawn & {w.one for w in wordings.TEST_WORDINGS.values()}


def test_uuid_has_the_form_of_version_4() -> None:
    value = wordings.random_key(random.Random(11), "uuids")
    assert re.fullmatch(
        r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", value
    )


@pytest.mark.parametrize(
    "change",
    [
        {"task": "qa"},
        {"haystack": "hay"},
        {"key_kind": "emoji"},
        {"wording": "rude"},
        {"depth_range": (0.5, 0.5)},
        {"keys": 0},
    ],
)
def test_bad_spec_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        RulerSpec(**change)  # type: ignore[arg-type]


def test_too_small_a_target_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        build_sample(RulerSpec("niah_multikey"), 50, count_words, seed=12)


def test_demo_document_hides_its_needle_where_it_says() -> None:
    demo = build_demo(8000, count_words, seed=13)
    needle = demo.text.encode()[demo.needle_begin : demo.needle_end].decode()
    assert needle.endswith(f"{demo.answer}.")
    key = needle.split(" for ")[1].split(" is: ")[0]
    assert key in demo.question
    assert 7900 <= count_words(demo.text) + count_words(demo.question) <= 8000


def test_docstring_sentences_are_plentiful_and_flat() -> None:
    sentences = collect_sentences()
    assert len(sentences) > 3000
    assert not any("\n" in sentence for sentence in sentences)
