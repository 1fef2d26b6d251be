"""Write the GGUF files from trained checkpoints: `python -m models.export RUN_DIR [--f32]`.

RUN_DIR holds target.npz, drafter.npz and drafter-cross.npz, as `models.training.run_all` leaves
them. The Q8_0 files go to models/ under their final names; --f32 writes full-precision twins into
RUN_DIR for the checks. `--random` ignores checkpoints and writes untrained weights of the same
structure.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant

from models.checkpoint import Arrays, load_checkpoint, random_arrays, round_for_shipping
from models.shapes import (
    CHAT_TEMPLATE,
    CONTEXT_LENGTH,
    MODELS_DIR,
    SHAPES,
    SPECIAL_TOKENS,
    Qwen3Shape,
)

LICENCE = "apache-2.0"


def write_gguf(path: Path, shape: Qwen3Shape, arrays: Arrays, quantise: bool) -> None:
    """Write one model: matrices as Q8_0 when `quantise`, else float32; norms as float32."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
    _add_metadata(writer, shape, quantise)
    _add_vocabulary(writer, shape)
    for name in shape.tensor_shapes():
        array = arrays[name].astype(np.float32)
        if quantise and array.ndim == 2:
            packed = gguf.quants.quantize(array, Quant.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=Quant.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: gguf.GGUFWriter, shape: Qwen3Shape, quantise: bool) -> None:
    file_type = gguf.LlamaFileType.MOSTLY_Q8_0 if quantise else gguf.LlamaFileType.ALL_F32
    writer.add_name(shape.title)
    writer.add_basename(f"skim-{shape.name}")
    writer.add_description("Demonstration model of the Skim project: retrieval over long prompts")
    writer.add_license(LICENCE)
    writer.add_languages(["en"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Qwen3Shape) -> None:
    stored: dict[str, Any] = json.loads(shape.tokenizer_path.read_text())
    ids = dict(stored["model"]["vocab"]) | {t["content"]: t["id"] for t in stored["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[t] for t in tokens] != list(range(shape.vocabulary)):
        raise ValueError(f"{shape.tokenizer_path}: ids are not 0 to {shape.vocabulary - 1}")
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in SPECIAL_TOKENS else normal for t in tokens])
    writer.add_token_merges(
        [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    )
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def main() -> None:
    """Export every model whose checkpoint is there (or all three, untrained, with --random)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--f32", action="store_true", help="also write float32 twins into RUN_DIR")
    parser.add_argument("--out", type=Path, default=MODELS_DIR, help="where the Q8_0 files go")
    parser.add_argument("--random", action="store_true", help="untrained weights")
    options = parser.parse_args()
    for shape in SHAPES.values():
        checkpoint = options.run_dir / f"{shape.name}.npz"
        if options.random:
            arrays = round_for_shipping(random_arrays(shape, seed=0))
        elif checkpoint.is_file():
            shape, arrays, _ = load_checkpoint(checkpoint)
        else:
            print(f"{shape.name}: no {checkpoint}, left as it is")
            continue
        path = options.out / shape.gguf_path.name
        write_gguf(path, shape, arrays, quantise=True)
        if options.f32:
            write_gguf(
                options.run_dir / f"skim-{shape.name}-f32.gguf", shape, arrays, quantise=False
            )
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
