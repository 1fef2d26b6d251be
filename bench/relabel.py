"""Relabel a qwen3 GGUF as qwen3vl, whose rope allows gaps between positions.

Metadata only: the same tensors under another architecture name, with rope sections that split
head_dim / 2 over the three axes, so contiguous positions give the very logits of the original.
Lets benches and tests run ORIGINAL positions with the bundled target.
"""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter


def relabel_as_qwen3vl(source: Path, destination: Path) -> None:
    """Write `destination` with the tensors of `source` and the architecture qwen3vl."""
    reader = GGUFReader(source)
    writer = GGUFWriter(destination, "qwen3vl")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        name = field.name.replace("qwen3.", "qwen3vl.", 1)
        kind = field.types[0]
        inner = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    half = int(reader.fields["qwen3.attention.key_length"].contents()) // 2
    writer.add_rope_dimension_sections([(half + 2) // 3, (half + 1) // 3, half // 3, 0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
