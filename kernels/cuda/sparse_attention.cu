// Causal attention of a tile of queries over a list of key blocks, the pruned blocks being stood
// for by their means. The portable path: mma.sync and cp.async, sm_80 and up.
//
// Maths, for query head h, tile I (128 positions i), its list (ascending, the diagonal block last)
// and the blocks J < I that are not listed:
//   weight of a key j <= i of a listed block   exp(scale q_i . k_j)              value v_j
//   weight of a block that is not listed       128 exp(scale q_i . k_mean_J)     value v_mean_J
//   o_i = sum of weight x value / sum of weights
// The sums run online, KEYS keys or means a step: a row's maximum logit, its sum of weights and its
// unnormalised output are rescaled whenever the maximum grows. Logits are kept as powers of two
// (scale x log2 e), in which the factor 128 is an added 7. Weights are rounded to bf16 for the
// product with the values; their sum is taken before the rounding.
//
// Shapes:  q                bf16 [num_tokens, heads * HEAD_DIM], rows `row_stride` elements apart;
//                           the output is written over it (a block reads no q but its own tile)
//          k, v             bf16 [num_tokens, kv_heads * HEAD_DIM], the same stride; head h / group
//          k_mean, v_mean   bf16 [kv_heads, num_blocks, HEAD_DIM]; null: no correction
//          indices          int32 [heads, num_blocks (tiles), num_blocks]; null: every block J <= I
//          counts           int32 [heads, num_blocks]
// Grid:    (heads, num_blocks); the last, longest tiles start first, heads that share keys at once.
// Block:   128 threads with 32 rows a warp; 256 threads with 16 rows a warp for HEAD_DIM 256.
// Shared:  tiles of queries, keys and values as panels of 64 columns: 48, 64, 96 KiB for HEAD_DIM
//          64, 128, 256; then a bit for each block of the prompt.
// Limits:  HEAD_DIM 64, 128 or 256; 16-byte aligned rows; 24,000 blocks of the prompt (what the 99
//          KiB of sm_89 leave at 256). Rows past the end are neither read nor written.
// Source:  FlashAttention-2 (arXiv:2307.08691), FlashPrefill V2 (arXiv:2608.19758).
// Reference: kernels/reference/sparse_attention.py.
// Measured (H100, a layer of Qwen3-0.6B at 131,072 tokens):
// 13.4 ms at density 0.05 (258 TFLOP/s useful), dense 222 ms (316).
//
// Keys and values have two stages: a step's rows travel during the whole step before it, and one
// barrier a step says both that they are there and that the other stage is free. A step is short
// (4,096 / HEAD_DIM keys), so that its logits and the output fit the registers without a spill.

#include "common.cuh"
#include "ptx.cuh"

constexpr int M_TILES = HEAD_DIM <= 128 ? 2 : 1;  // 16-row tiles of a warp: what its registers hold
constexpr int WARPS = BLOCK_TOKENS / (16 * M_TILES);
constexpr int THREADS = WARPS * WARP;
constexpr int KEYS = 4096 / HEAD_DIM;  // of a step
constexpr int STEPS_PER_BLOCK = BLOCK_TOKENS / KEYS;
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes in a row
constexpr int Q_BYTES = BLOCK_TOKENS * HEAD_DIM * 2;
constexpr int KV_BYTES = KEYS * HEAD_DIM * 2;  // 8 KiB
constexpr int STAGE_BYTES = 2 * KV_BYTES;      // keys, then values

// Byte offset of the 16-byte piece `piece` of row `row` in a tile of ROWS rows. Eight pieces make a
// panel's row of 128 bytes; the exclusive or spreads one column of pieces over all banks.
template <int ROWS>
__device__ __forceinline__ u32 swizzled(int row, int piece) {
  return ((piece / 8 * ROWS) + row) * 128 + ((piece ^ row) & 7) * 16;
}

// Start copying ROWS rows of HEAD_DIM columns: the first `real` from memory, then zeros.
template <int ROWS>
__device__ __forceinline__ void load_rows(u32 tile, const bf16* from, int stride, int real) {
  constexpr int ROUND = THREADS / PIECES;
  static_assert(ROUND % 8 == 0, "a thread keeps its place in the swizzle");
  const int piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
  tile += swizzled<ROWS>(first, piece);
  from += piece * 8;
#pragma unroll
  for (int begin = 0; begin < ROWS; begin += ROUND) {
    const int row = begin + first;
    const bool valid = row < real;
    cp_async_16(tile + begin * 128, from + static_cast<i64>(valid ? row : 0) * stride, valid);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, M_TILES)
sparse_attention(bf16* q, const bf16* k, const bf16* v, int row_stride, const bf16* k_mean,
                 const bf16* v_mean, const int* indices, const int* counts, int num_tokens,
                 int num_blocks, int group, float scale_log2) {
  SKIM_SHARED(shared);
  u32* const hidden = reinterpret_cast<u32*>(shared + Q_BYTES + 2 * STAGE_BYTES);
  const u32 q_tile = shared_address(shared), stages = q_tile + Q_BYTES;
  const int lane = lane_index();

  const int head = blockIdx.x, tile = gridDim.y - 1 - blockIdx.y, kv_head = head / group;
  const int first_row = tile * BLOCK_TOKENS, rows = min(BLOCK_TOKENS, num_tokens - first_row);
  q += static_cast<i64>(first_row) * row_stride + head * HEAD_DIM;
  int count = tile + 1;
  if (indices) {
    indices += (static_cast<i64>(head) * num_blocks + tile) * num_blocks;
    count = counts[head * num_blocks + tile];
  }
  const int diagonal_step = (count - 1) * STEPS_PER_BLOCK;
  const int list_steps = diagonal_step + ceil_div(rows, KEYS);
  int steps = list_steps;
  if (k_mean && count <= tile) {
    steps += ceil_div(tile, KEYS);
    // A bit for each mean that must not count: of a listed block, or not before the diagonal.
    for (int word = threadIdx.x; word * 32 < ceil_div(tile, KEYS) * KEYS; word += THREADS)
      hidden[word] = word * 32 + 32 <= tile ? 0
                     : word * 32 >= tile    ? FULL_WARP
                                            : FULL_WARP << (tile & 31);
    __syncthreads();
    for (int i = threadIdx.x; i < count - 1; i += THREADS)
      atomicOr(&hidden[indices[i] >> 5], 1u << (indices[i] & 31));
  }
  // A step reads KEYS rows from `first` on, of keys and values or, after the list, of their means.
  const auto first_of = [&](int step) {
    if (step >= list_steps) return (step - list_steps) * KEYS;
    const int position = step / STEPS_PER_BLOCK;
    const int block = indices ? indices[position] : position;
    return block * BLOCK_TOKENS + step % STEPS_PER_BLOCK * KEYS;
  };
  const auto load_step = [&](int step, int first) {
    const u32 to = stages + step % 2 * STAGE_BYTES;
    if (step >= list_steps) {
      const i64 from = (static_cast<i64>(kv_head) * num_blocks + first) * HEAD_DIM;
      load_rows<KEYS>(to, k_mean + from, HEAD_DIM, tile - first);
      load_rows<KEYS>(to + KV_BYTES, v_mean + from, HEAD_DIM, tile - first);
    } else {
      const i64 from = static_cast<i64>(first) * row_stride + kv_head * HEAD_DIM;
      load_rows<KEYS>(to, k + from, row_stride, num_tokens - first);
      load_rows<KEYS>(to + KV_BYTES, v + from, row_stride, num_tokens - first);
    }
    cp_async_commit();
  };

  // Where this lane reads in ldmatrix (the operands of ptx.cuh); a step of two pieces along a
  // panel's row flips bits of the address.
  const int warp_row = warp_index() * 16 * M_TILES;
  const u32 q_lane = q_tile + swizzled<BLOCK_TOKENS>(warp_row + lane % 16, lane / 16);
  const u32 k_lane = stages + swizzled<KEYS>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const u32 v_lane = stages + KV_BYTES + swizzled<KEYS>(lane % 16, lane / 16);

  float out[M_TILES][HEAD_DIM / 8][4] = {};
  float row_max[M_TILES][2], row_sum[M_TILES][2];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    row_max[m][0] = row_max[m][1] = negative_infinity();
    row_sum[m][0] = row_sum[m][1] = 0.0f;
  }

  load_rows<BLOCK_TOKENS>(q_tile, q, row_stride, rows);
  load_step(0, first_of(0));
  int next_first = steps > 1 ? first_of(1) : 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // this step's rows are there, and every warp is done with the last ones
    if (step + 1 < steps) load_step(step + 1, next_first);
    if (step + 2 < steps) next_first = first_of(step + 2);  // in time for the next turn
    const u32 k_stage = k_lane + step % 2 * STAGE_BYTES, v_stage = v_lane + step % 2 * STAGE_BYTES;

    float logits[M_TILES][KEYS / 8][4] = {};
#pragma unroll 4
    for (int k16 = 0; k16 < HEAD_DIM / 16; ++k16) {
      u32 a[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m)
        ldmatrix_x4(a[m], (q_lane ^ (k16 % 4 * 32)) + (k16 / 4 * BLOCK_TOKENS + m * 16) * 128);
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2) {
        u32 b[4];
        ldmatrix_x4(b, (k_stage ^ (k16 % 4 * 32)) + (k16 / 4 * KEYS + n * 8) * 128);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          mma_m16n8k16(logits[m][n], a[m], b[0], b[1]);
          mma_m16n8k16(logits[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    if (step >= list_steps) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
        const int mean = (step - list_steps) * KEYS + n * 8;
        const u32 pair = hidden[mean / 32] >> (mean % 32 + lane % 4 * 2);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (pair & (1 << e % 2)) logits[m][n][e] = negative_infinity();
      }
    } else if (step >= diagonal_step) {
      const int after = (step - diagonal_step) * KEYS + lane % 4 * 2 - (warp_row + lane / 4);
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (after + n * 8 + e % 2 > m * 16 + e / 2 * 8)
              logits[m][n][e] = negative_infinity();
    }

    // The first step shows every row a key (of the diagonal block its first), so a maximum is
    // finite from then on, also where a later step hides all its keys from a row.
    const float bias = step >= list_steps ? LOG2_BLOCK_TOKENS : 0.0f;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float peak = negative_infinity();
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
          peak = fmaxf(peak, fmaxf(logits[m][n][half * 2], logits[m][n][half * 2 + 1]));
        const float old_max = row_max[m][half];
        const float new_max = fmaxf(old_max, fmaf(quad_max(peak), scale_log2, bias));
        const float rescale = exp2_approx(old_max - new_max), shift = bias - new_max;
        float sum = row_sum[m][half] * rescale;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            logits[m][n][e] = exp2_approx(fmaf(logits[m][n][e], scale_log2, shift));
            sum += logits[m][n][e];
          }
        }
        row_max[m][half] = new_max;
        row_sum[m][half] = sum;
        if (rescale != 1.0f) {  // after the first steps a maximum seldom grows
#pragma unroll
          for (int n = 0; n < HEAD_DIM / 8; ++n) {
            out[m][n][half * 2] *= rescale;
            out[m][n][half * 2 + 1] *= rescale;
          }
        }
      }
    }

    // Two accumulators side by side, rounded, are a left operand of the product with the values.
#pragma unroll
    for (int k16 = 0; k16 < KEYS / 16; ++k16) {
      u32 a[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &logits[m][k16 * 2 + i / 2][i % 2 * 2];
          a[m][i] = pack_bf16x2(pair[0], pair[1]);
        }
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; n += 2) {
        u32 b[4];
        ldmatrix_x4_trans(b, (v_stage ^ (n % 8 * 16)) + (n / 8 * KEYS + k16 * 16) * 128);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          mma_m16n8k16(out[m][n], a[m], b[0], b[1]);
          mma_m16n8k16(out[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Normalise into the warp's own rows of the Q tile, which no other warp reads; then store whole
  // 16-byte pieces.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = 1.0f / quad_sum(row_sum[m][half]);
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n)
        *reinterpret_cast<u32*>(shared + swizzled<BLOCK_TOKENS>(row, n) + lane % 4 * 4) =
            pack_bf16x2(out[m][n][half * 2] * inverse, out[m][n][half * 2 + 1] * inverse);
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * M_TILES * PIECES; i += WARP) {
    const int row = warp_row + i / PIECES, piece = i % PIECES;
    if (row < rows)
      *reinterpret_cast<uint4*>(q + static_cast<i64>(row) * row_stride + piece * 8) =
          *reinterpret_cast<const uint4*>(shared + swizzled<BLOCK_TOKENS>(row, piece));
  }
}
