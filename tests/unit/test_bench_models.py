"""Random models with a tokenizer: both libraries read them, and they say what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from bench import gguf_out, random_model, random_target
from bench.gguf_out import OutTensor, write_gguf
from bench.prompts import Prompts
from bench.random_model import write_random_gguf
from bench.random_target import WEIGHT_STD, write_random_target
from bench.vocabulary import SPECIALS, Vocabulary, learn
from modelfile.gguf_file import GgufFile
from modelfile.hparams import ModelShape
from modelfile.tokenizer import Tokenizer
from skim.demo_document import build_document
from target_svc.llama.model import Model
from tests.fixtures.contexts import library, open_context
from tests.fixtures.llama_tokens import LlamaTokenizer

SMALL = random_target.SHAPES["small"]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return learn()


@pytest.fixture(scope="module")
def target(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small target of the real one's layers."""
    return write_random_target(tmp_path_factory.mktemp("t") / "t.gguf", SMALL, vocabulary)


@pytest.fixture(scope="module")
def drafter(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drafter that goes with it."""
    shape = random_model.SHAPES["small"]
    return write_random_gguf(tmp_path_factory.mktemp("d") / "d.gguf", shape, vocabulary=vocabulary)


def text() -> bytes:
    return "\n\n".join(build_document(20_000, lambda part: len(part) // 4)).encode()


def test_target_and_drafter_cut_a_long_text_alike_in_both_libraries(
    target: Path, drafter: Path
) -> None:
    ids = []
    for path in (target, drafter):
        with GgufFile.open(path) as file:
            ids.append(Tokenizer.from_gguf(file).encode(text()).ids.tolist())
        with LlamaTokenizer(path) as theirs:
            ids.append(theirs.encode(text()))
    assert len(ids[0]) > 15_000
    assert all(found == ids[0] for found in ids)


def test_a_token_is_worth_about_what_large_vocabularies_give(target: Path) -> None:
    with GgufFile.open(target) as file:
        tokens = len(Tokenizer.from_gguf(file).encode(text()))
    assert 4.0 < len(text()) / tokens < 5.0


def test_a_vocabulary_is_padded_to_the_size_and_not_below_its_own(vocabulary: Vocabulary) -> None:
    known = len(vocabulary.tokens)
    tokens = vocabulary.metadata(known + 5, "qwen2")["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and len(set(tokens)) == known + 5
    assert tuple(tokens[known - len(SPECIALS) : known]) == SPECIALS
    with pytest.raises(ValueError, match=f"at least {known}, got {known - 1}"):
        vocabulary.metadata(known - 1, "qwen2")


def test_llama_cpp_runs_a_random_target_to_finite_logits_over_positions_with_gaps(
    target: Path,
) -> None:
    with open_context(target, cells=512) as context:
        assert (context.model.architecture, context.model.allows_gaps) == ("qwen35", True)
        ids = np.arange(200, dtype=np.int32)
        outputs = np.zeros(200, np.bool_)
        outputs[-1] = True
        context.decode(ids, 7 * ids, 0, outputs)
        row = context.row(199)
        assert np.isfinite(row).all()
        assert row.std() > 0.01


def test_matrices_of_a_random_target_are_centred_with_the_stated_spread(target: Path) -> None:
    seen = set()
    for tensor in gguf.GGUFReader(target).tensors:
        kind = tensor.tensor_type
        if kind.name in ("Q4_K", "Q6_K") and kind.name not in seen:
            seen.add(kind.name)
            values = dequantize(np.array(tensor.data[:256]), kind)
            # 65,536 values: the mean's own error is 8e-5; d is a half float, 0.1 % coarse.
            assert values.mean() == pytest.approx(0.0, abs=6e-4)
            assert values.std() == pytest.approx(WEIGHT_STD, rel=0.02)
    assert seen == {"Q4_K", "Q6_K"}


def test_the_real_shape_has_the_size_that_the_baseline_was_measured_on() -> None:
    shape = random_target.SHAPES["27b"]
    tensors = random_target.tensors_of(shape, np.random.default_rng(0))
    assert sum(int(np.prod(t.shape)) for t in tensors) == pytest.approx(26.9e9, rel=0.01)
    assert sum(tensor.size_bytes for tensor in tensors) == pytest.approx(16.2e9, rel=0.02)


def test_a_drafter_is_read_with_its_shape(drafter: Path) -> None:
    with GgufFile.open(drafter) as file:
        shape = ModelShape.from_gguf(file)
    assert (shape.arch, shape.layers, shape.vocab_size) == ("qwen3", 4, SMALL.vocab_size)


def test_tensors_are_written_whole_whatever_the_pieces_and_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gguf_out, "PIECE_BYTES", 1000)
    data = np.random.default_rng(0).integers(0, 256, 777, dtype=np.uint8)
    odd = OutTensor("odd", (3, 37), "F32", data, start=700)
    even = OutTensor("even", (64, 64), "BF16", data)
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "x"}, [odd, even], threads=3)
    with GgufFile.open(path) as file:
        for tensor in (odd, even):
            want = np.resize(np.roll(data, -tensor.start), tensor.size_bytes)
            assert bytes(file.tensor_bytes(tensor.name)) == want.tobytes()


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    data = np.zeros(144, np.uint8)
    with pytest.raises(ValueError, match="multiple of 256 values, got 300"):
        _ = OutTensor("w", (2, 300), "Q4_K", data).size_bytes


def test_prompts_have_the_asked_length_and_differ_by_seed(target: Path) -> None:
    with GgufFile.open(target) as file:
        tokenizer = Tokenizer.from_gguf(file)
    prompts = Prompts(tokenizer, 3_000)
    made = {
        (size, seed): prompts.make(size, seed=seed) for size in (64, 3_000) for seed in range(4)
    }
    assert all(len(tokenizer.encode(made[key])) == key[0] for key in made)
    assert len({prompt[:200] for prompt in made.values()}) == 8
    with pytest.raises(ValueError, match="num_tokens must be at least"):
        prompts.make(5, seed=0)


def test_llama_cpp_loads_a_model_whose_vocabulary_is_mostly_padding(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    shape = replace(SMALL, vocab_size=40_000, layers=4)
    path = write_random_target(tmp_path / "padded.gguf", shape, vocabulary)
    model = Model(library(), str(path), 0)
    try:
        assert model.n_vocab == 40_000
        assert model.eog_ids().tolist() == [len(vocabulary.tokens) - 3, len(vocabulary.tokens) - 1]
    finally:
        model.close()
