"""What every kernel computes, in NumPy: the specification that the CUDA kernels are tested against.

Reading order: rounding, block_mean, block_score, block_select, sparse_attention, tail_score,
chunk_reduce, then the small ones (rmsnorm, rope, silu_mul). Each is whole-array and plain; the CPU
backend has a quicker tile loop of its own, which the tests hold to these. Shapes throughout:

    q        [num_heads, num_tokens, head_dim]       rotated, unscaled
    k, v     [num_kv_heads, num_tokens, head_dim]
    k_mean   [num_kv_heads, num_blocks, head_dim]    num_blocks = ceil(num_tokens / block_tokens)
    mass     [num_heads, num_tiles, num_blocks]      num_tiles = num_blocks

Query head h reads KV head h // (num_heads / num_kv_heads).
"""

from kernels.reference.block_mean import block_mean
from kernels.reference.block_score import block_mass, block_score
from kernels.reference.block_select import BlockLists, BlockRule, block_select, select_row
from kernels.reference.chunk_reduce import chunk_mean, chunk_sum
from kernels.reference.rmsnorm import rmsnorm
from kernels.reference.rope import RopeScaling, apply_rope, rope_tables
from kernels.reference.rounding import round_to_bf16
from kernels.reference.silu_mul import silu_mul
from kernels.reference.sparse_attention import dense_attention, sparse_attention
from kernels.reference.tail_score import attention_rows, average_pool, tail_score

__all__ = [
    "BlockLists",
    "BlockRule",
    "RopeScaling",
    "apply_rope",
    "attention_rows",
    "average_pool",
    "block_mass",
    "block_mean",
    "block_score",
    "block_select",
    "chunk_mean",
    "chunk_sum",
    "dense_attention",
    "rmsnorm",
    "rope_tables",
    "round_to_bf16",
    "select_row",
    "silu_mul",
    "sparse_attention",
    "tail_score",
]
