// Block-sparse causal attention with the mean correction, for Hopper (wgmma, TMA, warp roles).
//
//   out_i = sum_j p_ij v_j / sum_j p_ij,  p_ij = exp(scale q_i.k_j),  over the listed blocks' keys j <= i
//   and, for each pruned block J < I, 128 exp(scale q_i.k_mean_J) (v_mean_J, 1) added to both sums.
//
// Shapes   q [n, heads, DIM], k, v [n, kv_heads, DIM]: bf16 columns of rows `row_stride` apart; k_mean,
//          v_mean [kv_heads, num_blocks, DIM] bf16; indices int32 [heads, num_tiles, num_blocks] ascending
//          (last one the diagonal), counts int32 [heads, num_tiles]; null indices: every J <= I.
//          The output replaces q; each item reads only its own q tile, before it writes it.
// Grid     PERSISTENT: at most one block a multiprocessor; a block takes item blockIdx.x, then whatever
//          next_item[0] (zeroed before the launch) hands out. Otherwise one block an item. An item is one
//          (query head, 128-query tile); which block computes it changes no bit of the result.
// Block    384 threads: warpgroup 0 loads, warpgroups 1 and 2 compute 64 query rows each.
// Shared   FIXED_BYTES + QUERY_SLOTS * round_up(num_blocks, KEY_TILE) * 4 (kernels/ops/attention_sm90.py).
// Limits   DIM 64, 128, 256; num_blocks as shared memory allows; sm_90a alone.
// Knobs    KEY_TILE (keys a step; 64, 128), STAGES (tiles in flight), QUERY_SLOTS (items in flight),
//          PING_PONG (the computing groups take turns at the tensor cores), PERSISTENT.
// Tested   against kernels/reference/sparse_attention.py.
// Measured (H100, a layer of Qwen3-0.6B at 131,072 tokens):
// 6.6 ms at density 0.05 (522 TFLOP/s useful), dense 112.5 ms (625).
//
// Order of an item: the diagonal block (the only one that needs the causal mask, so every row maximum is
// finite from the first step), the other listed blocks, then tiles of means. One loop runs on over items:
// while the weights of step t are multiplied by V, the scores of step t + 1 are already in the tensor
// cores, also when t + 1 belongs to the next item, whose Q waits in the other slot.
#include "attention_sm90.cuh"
#include "attention_sm90_load.cuh"
#include "ptx.cuh"

// Of the two rows lane / 4 and lane / 4 + 8 of a warp's sixteen; the maximum is of raw scores.
struct Softmax {
  float maximum[2], sum[2];
};

// What a computing thread holds. Accumulators: row 16 warp + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + e
// is element 4 j + 2 h + e.
struct Worker {
  Shared shared;
  int group, lane;
  int row;     // of the item's 128: this thread's first one, the other is 8 below
  int column;  // of a group of 8: this thread's first one
  float scale_log2;
  Ring<STAGES> keys, values;
  float scores[KEYS / 2];
  float output[DIM / 2];
  u32 weights[KEYS / K_STEP][4];  // bf16 pairs: the A operands of the second product
  Softmax softmax;
};

__device__ __forceinline__ u64 k_major(const unsigned char* tile) {
  return wgmma_descriptor(tile, 16, 8 * PANEL_STRIDE);
}

// scores = Q K^T, started.
__device__ __forceinline__ void start_scores(Worker& w, int slot) {
  const u64 q = k_major(w.shared.queries(slot) + w.group * GROUP_ROWS * PANEL_STRIDE);
  const u64 k = k_major(w.shared.keys(w.keys.at));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < DIM / K_STEP; ++step) {
    const int panel = step / (PANEL / K_STEP), inside = step % (PANEL / K_STEP) * K_STEP * 2;
    wgmma_ss<KEYS>(w.scores, q + ((panel * BLOCK_TOKENS * PANEL_STRIDE + inside) >> 4),
                   k + ((panel * KEYS * PANEL_STRIDE + inside) >> 4), step > 0);
  }
  wgmma_commit();
}

// output (+)= weights V, started.
__device__ __forceinline__ void start_output(Worker& w, bool accumulate) {
  const u64 v = wgmma_descriptor(w.shared.values(w.values.at), KEYS * PANEL_STRIDE, 8 * PANEL_STRIDE);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < KEYS / K_STEP; ++step)
    wgmma_rs<DIM>(w.output, w.weights[step], v + ((step * K_STEP * PANEL_STRIDE) >> 4),
                  accumulate || step > 0);
  wgmma_commit();
}

// One arrival a warp: each has waited for its own part of the products that read the buffer.
__device__ __forceinline__ void release(u64* empty, int lane) {
  if (lane == 0) mbarrier_arrive(empty);
}

enum Mask { NO_MASK, CAUSAL, MEANS };

// `part`: which tile of the diagonal block (CAUSAL) or of the means (MEANS) the scores belong to.
template <Mask MASK>
__device__ __forceinline__ void mask_scores(Worker& w, int slot, int part) {
  if (MASK == CAUSAL) {
    const int limit = w.row - w.column - part * KEYS;  // of the columns that the first row sees
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (i / 4 * 8 + i % 2 > limit + i % 4 / 2 * 8) w.scores[i] = negative_infinity();
  }
  if (MASK == MEANS) {
    const float* offsets = w.shared.offsets(slot) + part * KEYS + w.column;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      const float2 offset = *reinterpret_cast<const float2*>(offsets + 8 * j);
      w.scores[4 * j] += offset.x;
      w.scores[4 * j + 1] += offset.y;
      w.scores[4 * j + 2] += offset.x;
      w.scores[4 * j + 3] += offset.y;
    }
  }
}

// Turn scores into weights and bring maxima and sums up to date; `rescale`: what the output so far
// must be multiplied by. Even and odd columns are reduced apart, which halves the chains.
template <bool FIRST>
__device__ __forceinline__ void online_softmax(Worker& w, float (&rescale)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float even = w.scores[2 * h], odd = w.scores[2 * h + 1];
#pragma unroll
    for (int j = 1; j < KEYS / 8; ++j) {
      even = fmaxf(even, w.scores[4 * j + 2 * h]);
      odd = fmaxf(odd, w.scores[4 * j + 2 * h + 1]);
    }
    float maximum = quad_max(fmaxf(even, odd));
    if (!FIRST) maximum = fmaxf(maximum, w.softmax.maximum[h]);
    rescale[h] = FIRST ? 0.0f : exp2_approx((w.softmax.maximum[h] - maximum) * w.scale_log2);
    w.softmax.maximum[h] = maximum;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float shift = -w.softmax.maximum[h] * w.scale_log2;
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int j = 0; j < KEYS / 8; ++j) {
      float* const pair = w.scores + 4 * j + 2 * h;
      pair[0] = exp2_approx(fmaf(pair[0], w.scale_log2, shift));
      pair[1] = exp2_approx(fmaf(pair[1], w.scale_log2, shift));
      even += pair[0];
      odd += pair[1];
    }
    w.softmax.sum[h] = (FIRST ? 0.0f : w.softmax.sum[h] * rescale[h]) + (even + odd);
  }
}

__device__ __forceinline__ void pack_weights(Worker& w) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; ++i)
    w.weights[i / 4][i % 4] = pack_bf16x2(w.scores[2 * i], w.scores[2 * i + 1]);
}

// One step of the loop: scores of the next tile, output of the present one. FIRST: the next tile opens
// another item; the output is then complete and the caller stores it.
template <Mask MASK, bool FIRST>
__device__ __forceinline__ void advance(Worker& w, int slot, int part, bool accumulate) {
  mbarrier_wait(w.shared.keys_full(w.keys.at), w.keys.parity);
  if (PING_PONG) barrier_sync(FIRST_TURN + w.group, GROUPS * GROUP_THREADS);
  start_scores(w, slot);
  mbarrier_wait(w.shared.values_full(w.values.at), w.values.parity);
  start_output(w, accumulate);
  if (PING_PONG) barrier_arrive(FIRST_TURN + 1 - w.group, GROUPS * GROUP_THREADS);
  wgmma_wait<1>(w.scores);
  release(w.shared.keys_empty(w.keys.at), w.lane);
  w.keys.advance();
  mask_scores<MASK>(w, slot, part);
  float rescale[2];
  online_softmax<FIRST>(w, rescale);
  // Passed at once. A loop is what the assembler does not move the wait below over: without it, the wait
  // for the output stands before the exponentials, which are there to be done meanwhile.
  mbarrier_wait(w.shared.values_full(w.values.at), w.values.parity);
  wgmma_wait<0>(w.output);
  release(w.shared.values_empty(w.values.at), w.lane);
  w.values.advance();
  pack_weights(w);
  if constexpr (!FIRST) {
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i) w.output[i] *= rescale[i % 4 / 2];
  }
}

// Transpose 4 x 4 registers among the four lanes that share a row: lane t gets element t of each.
__device__ __forceinline__ void transpose_quad(u32 (&x)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      const u32 other = __shfl_xor_sync(FULL_WARP, upper ? x[i] : x[i | distance], distance);
      (upper ? x[i] : x[i | distance]) = other;
    }
  }
}

// Divide by the sums, round to bf16 and write over the item's queries, 16 bytes a store.
__device__ __forceinline__ void store_output(const Worker& w, const Item& item, const float (&sum)[2],
                                             const Problem& problem, bf16* q, i64 row_stride) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float inverse = 1.0f / quad_sum(sum[h]);
    const int token = item.tile * BLOCK_TOKENS + w.row + 8 * h;
    bf16* const out = q + token * row_stride + item.head * DIM + w.lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 4) {
      u32 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = w.output + 4 * (j + i) + 2 * h;
        x[i] = pack_bf16x2(pair[0] * inverse, pair[1] * inverse);
      }
      transpose_quad(x, w.lane);
      if (token < problem.num_tokens)
        *reinterpret_cast<uint4*>(out + 8 * j) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

__device__ __forceinline__ void compute_items(const Problem& problem, Worker& w, bf16* q,
                                              i64 row_stride) {
  Ring<QUERY_SLOTS> slots;
  mbarrier_wait(w.shared.item_full(0), 0);
  Item item = *w.shared.item(0);
  if (PING_PONG && w.group == 1) barrier_arrive(FIRST_TURN, GROUPS * GROUP_THREADS);
  mbarrier_wait(w.shared.keys_full(0), 0);
  start_scores(w, 0);
  wgmma_wait<0>(w.scores);
  release(w.shared.keys_empty(0), w.lane);
  w.keys.advance();
  mask_scores<CAUSAL>(w, 0, 0);
  float unused[2];
  online_softmax<true>(w, unused);
  pack_weights(w);
  for (;;) {
    bool accumulate = false;  // the first product of an item replaces the output of the last
#pragma unroll
    for (int part = 1; part < KEY_TILES; ++part, accumulate = true)
      advance<CAUSAL, false>(w, slots.at, part, accumulate);
    for (int left = (item.count - 1) * KEY_TILES; left > 0; --left, accumulate = true)
      advance<NO_MASK, false>(w, slots.at, 0, accumulate);
    if (item.mean_tiles > 0) mbarrier_wait(w.shared.offsets_full(slots.at), slots.parity);
    for (int part = 0; part < item.mean_tiles; ++part, accumulate = true)
      advance<MEANS, false>(w, slots.at, part, accumulate);
    mbarrier_arrive(w.shared.item_empty(slots.at));
    slots.advance();
    mbarrier_wait(w.shared.item_full(slots.at), slots.parity);
    const Item next = *w.shared.item(slots.at);
    const float sum[2] = {w.softmax.sum[0], w.softmax.sum[1]};
    if (next.tile < 0) {
      mbarrier_wait(w.shared.values_full(w.values.at), w.values.parity);
      start_output(w, accumulate);
      wgmma_wait<0>(w.output);
    } else {
      advance<CAUSAL, true>(w, slots.at, 0, accumulate);
    }
    store_output(w, item, sum, problem, q, row_stride);
    if (next.tile < 0) break;
    item = next;
  }
  // The last turn that group 1 gave away: no barrier is left half full.
  if (PING_PONG && w.group == 0) barrier_sync(FIRST_TURN, GROUPS * GROUP_THREADS);
}

extern "C" __global__ void __launch_bounds__((1 + GROUPS) * GROUP_THREADS, 1)
    sparse_attention_sm90(const __grid_constant__ TMap q_map, const __grid_constant__ TMap k_map,
                          const __grid_constant__ TMap v_map,
                          const __grid_constant__ TMap k_mean_map,
                          const __grid_constant__ TMap v_mean_map, bf16* q, i64 row_stride,
                          const int* indices, const int* counts, int* next_item, int num_tokens,
                          int num_heads, int num_kv_heads, int full_tiles, int corrected,
                          float scale) {
  SKIM_SHARED(base);
  const int num_tiles = ceil_div(num_tokens, BLOCK_TOKENS);
  const Shared shared{base, ceil_div(num_tiles, KEYS) * KEYS};
  const Problem problem{indices,   counts,       next_item,  num_tokens,     num_tiles,
                        num_heads, num_kv_heads, full_tiles, corrected != 0, scale * LOG2E};
  if (threadIdx.x == 0) init_barriers(shared);
  __syncthreads();
  // The same in all lanes; the shuffle tells the compiler so, which keeps descriptors in uniform registers.
  const int warp = __shfl_sync(FULL_WARP, warp_index(), 0);
  if (warp < GROUP_THREADS / WARP) {
    registers_release<LOADING_REGISTERS>();
    if (warp == 0)
      load_items(problem, shared,
                 Sources{&q_map, {&k_map, 0}, {&v_map, 0}, {&k_mean_map, 0}, {&v_mean_map, 0}});
  } else {
    registers_claim<COMPUTING_REGISTERS>();
    Worker w;
    w.shared = shared;
    w.group = warp / (GROUP_THREADS / WARP) - 1;
    w.lane = lane_index();
    w.row = (warp - GROUP_THREADS / WARP) * 16 + w.lane / 4;
    w.column = w.lane % 4 * 2;
    w.scale_log2 = problem.scale_log2;
#pragma unroll
    for (int i = 0; i < DIM / 2; ++i) w.output[i] = 0.0f;
    compute_items(problem, w, q, row_stride);
  }
}
