"""What a GGUF model file says without running it.

Imported by the drafter and by the target's service process; imports nothing of theirs. Reading
order: `gguf_file` (the door: map, metadata, tensors, digests; `header` walks the bytes) → `hparams`
and `rope_shape` (the model's sizes) → `vocabulary` → `boundaries` (where text may be cut) →
`tokenizer`, `incremental`, `stream_decoder` (text to ids and back) → `chat_template` → `doctor`.
"""
