"""The committed model files: structure, size, vocabulary and chat template."""

import gguf
import numpy as np
import pytest

from models.checkpoint import load_checkpoint, random_arrays, save_checkpoint
from models.checks import kl_divergence
from models.export import write_gguf
from models.llama import LlamaModel
from models.shapes import CHAT_TEMPLATE, DRAFTER, SHAPES, SPECIAL_TOKENS, Qwen3Shape
from models.training.tokenizer import load_tokenizer

ALL = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
TEXTS = (
    "The quick brown fox, 1234567 times; it's what we'll see.",
    "Ünïcödé — 漢字かな交じり文, עברית, 👩‍👩‍👧 and e\u0301 combining.",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # ok\r\n\r\n    done",
    "a <|im_end|> b <|im_start|>user\nc<|endoftext|>",
    " \n\n  \t trailing   ",
    "0x1F, 3.14e-10, 550e8400-e29b-41d4-a716-446655440000",
)


@ALL
def test_llama_cpp_and_tokenizers_agree_token_for_token(shape: Qwen3Shape) -> None:
    tokenizer = load_tokenizer(shape)
    with LlamaModel(shape.gguf_path, 64) as model:
        for text in TEXTS:
            assert model.tokenise(text) == tokenizer.encode(text).ids


@ALL
def test_special_text_is_one_token_only_when_control_text_is_parsed(shape: Qwen3Shape) -> None:
    with LlamaModel(shape.gguf_path, 64) as model:
        for number, text in enumerate(SPECIAL_TOKENS):
            expected = shape.vocabulary - len(SPECIAL_TOKENS) + number
            assert model.tokenise(text, parse_special=True) == [expected]
            assert len(model.tokenise(text)) > 1


@ALL
def test_digits_are_single_tokens(shape: Qwen3Shape) -> None:
    assert len(load_tokenizer(shape).encode("9071534").ids) == 7


def test_tokenizers_of_the_two_families_differ() -> None:
    pair, cross = (load_tokenizer(SHAPES[n]) for n in ("drafter", "drafter-cross"))
    ours = {t for t, i in pair.get_vocab().items() if i < cross.get_vocab_size()}
    assert len(ours & set(cross.get_vocab())) < 0.9 * cross.get_vocab_size()


def test_the_three_files_take_at_most_12_megabytes() -> None:
    assert sum(shape.gguf_path.stat().st_size for shape in SHAPES.values()) <= 12_000_000


@ALL
def test_metadata_says_what_the_shape_says(shape: Qwen3Shape) -> None:
    reader = gguf.GGUFReader(shape.gguf_path)
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "qwen3"
    assert value["tokenizer.ggml.pre"] == "qwen2"
    assert value["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert value["tokenizer.ggml.tokens"][value["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert value["qwen3.block_count"] == shape.layers
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    assert shapes == shape.tensor_shapes()


def test_checkpoint_returns_what_was_saved_and_refuses_a_missing_tensor(tmp_path) -> None:  # type: ignore[no-untyped-def]
    arrays = random_arrays(DRAFTER, seed=7)
    path = tmp_path / "drafter.npz"
    save_checkpoint(path, DRAFTER, arrays, {"steps": 3})
    shape, stored, notes = load_checkpoint(path)
    assert (shape, notes["steps"]) == (DRAFTER, 3)
    assert np.array_equal(stored["blk.0.attn_q.weight"], arrays["blk.0.attn_q.weight"].astype("f2"))
    del arrays["output_norm.weight"]
    save_checkpoint(path, DRAFTER, arrays, {})
    with pytest.raises(ValueError, match="tensors differ"):
        load_checkpoint(path)


def test_q8_0_export_stays_close_to_float32_on_random_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    # Q8_0 rounds each weight to 1/254 of its block's largest: logits move by about 1 %, and the
    # divergence by the square of that; 1e-3 nat is a hundred times what is seen.
    arrays = random_arrays(DRAFTER, seed=7)
    logits = []
    for quantise in (True, False):
        path = tmp_path / f"{quantise}.gguf"
        write_gguf(path, DRAFTER, arrays, quantise)
        with LlamaModel(path, 64, exact=True) as model:
            logits.append(model.logits(list(range(40)), 40))
    assert kl_divergence(logits[1], logits[0]) < 1e-3
