// How strongly a few queries look at each prompt token, one layer at a time: exact softmax rows of
// every head, average-pooled, then the maximum over heads and layers; and the coverage panel.
//
//   p[h, i, t] = softmax over t <= position_i of scale * q[h, i] . k[h / group, t]        (t < n)
//   running_max[i, t] = max(running_max[i, t], max_h mean of p[h, i, t - half .. t + half])
//   panel[i, c] += sum over chunk c of mean_h p[h, i, t]
//
//   q  bf16, query i in row q_rows[i] of `q_row_stride` elements, head h at column h * HEAD_DIM
//   k  bf16, key t in row t of `k_row_stride` elements, KV head h at column h * HEAD_DIM
//   positions  int32 [num_queries]     logits  float32 [num_heads * num_queries, logits_stride], scratch
//   partials  float2 [num_heads * num_queries, num_slices], scratch; norms  float2 [num_heads * num_queries]
//   running_max  float32 [num_queries, n]     panel  float32 [num_queries, ceil(n / chunk_tokens)]
//   Row h * num_queries + i of logits, partials and norms belongs to head h and query i.
//
// Three launches; all sums have a fixed order, so the same inputs give the same bits.
//   tail_logits   logits in powers of two (scale and log2 e folded in), and per slice of 512 keys the
//                 maximum and the sum of 2^(logit - maximum). Keys are read once for all the query heads
//                 of their KV head, straight into mma fragments: components are summed in an order of
//                 our own in which a lane's 16 bytes are its operands of two products.
//                 Grid: (num_kv_heads * column_groups, num_slices). Block: 128. Shared: 24 * HEAD_DIM * 2.
//   tail_combine  slices to (maximum, 1 / sum). Grid: num_heads * num_queries. Block: 32.
//   tail_pool     probabilities, pool, maximum, panel. A block of threads holds 1,024 keys of four heads
//                 and scores all but the `halo` (pool / 2 rounded up to 4) at either end, whose
//                 neighbours it lacks. Grid: (ceil(n / span_tokens), num_queries), where a span is whole
//                 chunks and a multiple of 4. Block: 256. Shared: 18 KiB, static.
// Limits: HEAD_DIM 64, 128, 256; num_heads <= 256; pool odd, <= 1017 (POOL 0: given at run time);
// every position >= 0; logits_stride % 4 == 0; q, k 16-byte aligned, strides % 8 == 0.
// Keys that a query may not see get exact zeros; NaN stays NaN.
// Traffic at 131,072 tokens, 8 KV heads of 128, 144 rows: 268 MB keys + 2 * 75 MB logits a layer.
// Reference: tail_score, chunk_sum.
// Measured (H100, a layer of Qwen3-0.6B at 131,072 tokens): 9 queries in 0.174 ms, 2.9 TB/s.
#include "vectors.cuh"

// ---- logits and partial sums -------------------------------------------------------------------------
#ifdef HEAD_DIM

constexpr int SLICE_KEYS = 512;   // of a block of threads
constexpr int WARPS = 4;
constexpr int TILE_KEYS = 16;     // rows of an mma
constexpr int TILES = 3;          // of 8 columns (query heads x queries) in one reading of the keys
constexpr int COLUMNS = 8 * TILES;
constexpr int PIECES = HEAD_DIM / 32;  // 32 components: 16 bytes of each of a quad's four lanes
// Below any logit, yet finite: -inf minus it is -inf, and it minus itself is 0, never NaN.
constexpr float LOWEST = -1e30f;

// Fragments of the block's queries, so that lane l of a warp reads fragments[..][l]: conflict-free.
// Columns past the last are zero. Every thread's reads are independent of each other.
__device__ __forceinline__ void stage_queries(uint4 (&fragments)[TILES][PIECES][WARP],
                                              const bf16* q, const int* q_rows, int q_row_stride,
                                              int num_queries, int first_column, int num_columns) {
#pragma unroll
  for (int i = 0; i < ceil_div(TILES * PIECES, WARPS); ++i) {
    const int fragment = i * WARPS + warp_index();
    if (TILES * PIECES % WARPS != 0 && fragment >= TILES * PIECES) break;
    const int tile = fragment / PIECES, piece = fragment % PIECES;
    const int column = first_column + 8 * tile + lane_index() / 4;
    const int real = min(column, num_columns - 1);
    const i64 row = q_rows[real % num_queries];
    const uint4 raw = load_vector(q + row * q_row_stride + (real / num_queries) * HEAD_DIM +
                                  32 * piece + VECTOR * (lane_index() % 4));
    fragments[tile][piece][lane_index()] = column == real ? raw : make_uint4(0, 0, 0, 0);
  }
}

// Softmax of one column so far: largest logit, and sum of 2^(logit - largest).
struct Partial {
  float largest, sum;

  __device__ __forceinline__ void add(float first, float second) {
    const float top = fmaxf(largest, fmaxf(first, second));
    sum = sum * exp2_approx(largest - top) + exp2_approx(first - top) + exp2_approx(second - top);
    largest = top;
  }

  __device__ __forceinline__ void merge(float other_largest, float other_sum) {
    const float top = fmaxf(largest, other_largest);
    sum = sum * exp2_approx(largest - top) + other_sum * exp2_approx(other_largest - top);
    largest = top;
  }
};

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1)
    tail_logits(const bf16* __restrict__ q, const bf16* __restrict__ k,
                const int* __restrict__ q_rows, const int* __restrict__ positions,
                float* __restrict__ logits, float2* __restrict__ partials, int q_row_stride,
                int k_row_stride, int num_prompt, int logits_stride, int num_queries, int group,
                int column_groups, float scale_log2e) {
  __shared__ uint4 fragments[TILES][PIECES][WARP];
  __shared__ float2 by_warp[WARPS][COLUMNS];
  __shared__ int last_keys[COLUMNS];  // that each column sees
  const int kv_head = static_cast<int>(blockIdx.x) / column_groups;
  const int first_column = static_cast<int>(blockIdx.x) % column_groups * COLUMNS;
  const int num_columns = group * num_queries;  // of this KV head
  const int slice = static_cast<int>(blockIdx.y);
  const int g = lane_index() / 4, t = lane_index() % 4;

  stage_queries(fragments, q + static_cast<i64>(kv_head) * group * HEAD_DIM, q_rows, q_row_stride,
                num_queries, first_column, num_columns);
  if (static_cast<int>(threadIdx.x) < COLUMNS) {
    const int column = min(first_column + static_cast<int>(threadIdx.x), num_columns - 1);
    last_keys[threadIdx.x] = min(positions[column % num_queries], num_prompt - 1);
  }
  __syncthreads();
  // The lane's two columns of each tile: how far they see, and what they have seen.
  int last_key[TILES][2];
  Partial seen[TILES][2];
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      last_key[tile][c] = last_keys[8 * tile + 2 * t + c];
      seen[tile][c] = {LOWEST, 0.0f};
    }
  }

  const bf16* const keys = k + kv_head * HEAD_DIM + VECTOR * t;
  const int end = min((slice + 1) * SLICE_KEYS, num_prompt);
  const i64 first_row = static_cast<i64>(kv_head) * num_columns + first_column;
  for (int tile_key = slice * SLICE_KEYS + warp_index() * TILE_KEYS; tile_key < end;
       tile_key += WARPS * TILE_KEYS) {
    const int key = tile_key + g;  // and key + 8
    uint4 low[PIECES], high[PIECES];
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      low[piece] = load_vector(
          keys + static_cast<i64>(min(key, num_prompt - 1)) * k_row_stride + 32 * piece);
      high[piece] = load_vector(
          keys + static_cast<i64>(min(key + 8, num_prompt - 1)) * k_row_stride + 32 * piece);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if (first_column + 8 * tile >= num_columns) break;
      float products[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const uint4 query = fragments[tile][piece][lane_index()];
        const u32 first[4] = {low[piece].x, high[piece].x, low[piece].y, high[piece].y};
        const u32 second[4] = {low[piece].z, high[piece].z, low[piece].w, high[piece].w};
        mma_m16n8k16(products, first, query.x, query.y);
        mma_m16n8k16(products, second, query.z, query.w);
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * tile + 2 * t + c;
        const float near =
            key <= last_key[tile][c] ? products[c] * scale_log2e : negative_infinity();
        const float far =
            key + 8 <= last_key[tile][c] ? products[2 + c] * scale_log2e : negative_infinity();
        seen[tile][c].add(near, far);
        if (first_column + column < num_columns) {
          float* const target = logits + (first_row + column) * logits_stride + key;
          if (key < num_prompt) target[0] = near;
          if (key + 8 < num_prompt) target[8] = far;
        }
      }
    }
  }

  // The eight lanes of a column, then the warps, in a fixed order.
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      Partial& mine = seen[tile][c];
#pragma unroll
      for (int distance = 4; distance < WARP; distance *= 2) {
        const float largest = __shfl_xor_sync(FULL_WARP, mine.largest, distance);
        const float sum = __shfl_xor_sync(FULL_WARP, mine.sum, distance);
        mine.merge(largest, sum);
      }
      if (g == 0)
        by_warp[warp_index()][8 * tile + 2 * t + c] = make_float2(mine.largest, mine.sum);
    }
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= COLUMNS || first_column + column >= num_columns) return;
  Partial whole = {LOWEST, 0.0f};
#pragma unroll
  for (int w = 0; w < WARPS; ++w) whole.merge(by_warp[w][column].x, by_warp[w][column].y);
  partials[(first_row + column) * static_cast<i64>(gridDim.y) + slice] =
      make_float2(whole.largest, whole.sum);
}

// ---- pool, maximum, panel ------------------------------------------------------------------------------
#elif defined(POOL)

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int KEYS = 4;  // of a thread, side by side
constexpr int TILE_KEYS = THREADS * KEYS;
constexpr int HEADS_AT_ONCE = 4;
constexpr int MAX_HEADS = THREADS;

// The larger of the two, or NaN if either is: a broken layer must show in the scores.
__device__ __forceinline__ float larger(float kept, float value) {
  return value <= kept || kept != kept ? kept : value;
}

__device__ __forceinline__ float probability(float logit, float2 norm) {
  return exp2_approx(logit - norm.x) * norm.y;
}

// Raise the thread's four entries of running_max; a row starts on 16 bytes only where n % 4 == 0.
__device__ __forceinline__ void raise(float* running_max, const float (&best)[KEYS], int key,
                                      int limit, bool aligned) {
  if (aligned && key + KEYS <= limit) {
    float4* const target = reinterpret_cast<float4*>(running_max + key);
    const float4 kept = *target;
    *target = make_float4(larger(kept.x, best[0]), larger(kept.y, best[1]),
                          larger(kept.z, best[2]), larger(kept.w, best[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < KEYS; ++i)
    if (key + i < limit) running_max[key + i] = larger(running_max[key + i], best[i]);
}

// Add the sums of the mass of keys [begin, limit) to their chunks, a warp a chunk; mass[0] is `begin`'s.
__device__ __forceinline__ void add_chunks(float* panel, const float* mass, int begin, int limit,
                                           int chunk_tokens) {
  for (int chunk = begin / chunk_tokens + warp_index();
       static_cast<i64>(chunk) * chunk_tokens < limit; chunk += WARPS) {
    const i64 chunk_end = static_cast<i64>(chunk + 1) * chunk_tokens;
    const int from = max(chunk * chunk_tokens, begin);
    const int to = chunk_end < limit ? static_cast<int>(chunk_end) : limit;
    float sum = 0.0f;
    for (int key = from + lane_index(); key < to; key += WARP) sum += mass[key - begin];
    sum = warp_sum(sum);
    if (lane_index() == 0) panel[chunk] += sum;
  }
}

// The thread's four logits of each of the next heads; -inf where there is no key or no head.
__device__ __forceinline__ void read_logits(float4 (&raw)[HEADS_AT_ONCE], const float* logits,
                                            i64 head_stride, int heads_left, bool inside) {
  const float nothing = negative_infinity();
#pragma unroll
  for (int u = 0; u < HEADS_AT_ONCE; ++u) {
    raw[u] = make_float4(nothing, nothing, nothing, nothing);
    if (inside && u < heads_left)
      raw[u] = *reinterpret_cast<const float4*>(logits + u * head_stride);
  }
}

// Mean of `pool` entries around each of the thread's four; `row` points to the first of the halo.
__device__ __forceinline__ void pool_row(float (&means)[KEYS], const float* row, int pool,
                                         int halo) {
  const float4* const window = reinterpret_cast<const float4*>(row);
  const int skipped = halo - pool / 2;
#pragma unroll
  for (int i = 0; i < KEYS; ++i) means[i] = 0.0f;
#pragma unroll
  for (int j = 0; j < (2 * halo + KEYS) / KEYS; ++j) {
    const float4 four = window[j];
    const float entries[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < KEYS; ++i) {
        const int place = 4 * j + e - skipped - i;
        if (place >= 0 && place < pool) means[i] += entries[e];
      }
    }
  }
  const float share = 1.0f / static_cast<float>(pool);
#pragma unroll
  for (int i = 0; i < KEYS; ++i) means[i] *= share;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    tail_pool(const float* __restrict__ logits, const float2* __restrict__ norms,
              float* __restrict__ running_max, float* __restrict__ panel, int num_prompt,
              int logits_stride, int num_heads, int num_queries, int chunk_tokens, int num_chunks,
              int span_tokens, int pool_given) {
  __shared__ __align__(16) float rows[HEADS_AT_ONCE][TILE_KEYS];
  __shared__ float2 head_norms[MAX_HEADS];
  const int pool = POOL > 0 ? POOL : pool_given;
  const int halo = ceil_div(pool / 2, KEYS) * KEYS;
  const int scored = TILE_KEYS - 2 * halo;  // keys of a tile
  const int query = static_cast<int>(blockIdx.y);
  const int span_begin = static_cast<int>(blockIdx.x) * span_tokens;
  const int span_end = min(span_begin + span_tokens, num_prompt);
  const int place = KEYS * static_cast<int>(threadIdx.x);  // of the thread in the tile
  const i64 head_stride = static_cast<i64>(num_queries) * logits_stride;

  if (static_cast<int>(threadIdx.x) < num_heads)
    head_norms[threadIdx.x] = norms[static_cast<int>(threadIdx.x) * num_queries + query];
  __syncthreads();

  for (int begin = span_begin; begin < span_end; begin += scored) {
    const int limit = min(begin + scored, span_end);
    const int key = begin - halo + place;
    const bool inside = key >= 0 && key < num_prompt;
    const bool ours = key >= begin && key < limit;
    const float* const own_logits = logits + static_cast<i64>(query) * logits_stride + key;
    float mass[KEYS] = {}, best[KEYS] = {};
    float4 raw[HEADS_AT_ONCE];
    read_logits(raw, own_logits, head_stride, num_heads, inside);
    for (int head = 0; head < num_heads; head += HEADS_AT_ONCE) {
#pragma unroll
      for (int u = 0; u < HEADS_AT_ONCE; ++u) {
        if (head + u >= num_heads) break;
        const float2 norm = head_norms[head + u];
        const float p[KEYS] = {
            probability(raw[u].x, norm),
            key + 1 < num_prompt ? probability(raw[u].y, norm) : 0.0f,
            key + 2 < num_prompt ? probability(raw[u].z, norm) : 0.0f,
            key + 3 < num_prompt ? probability(raw[u].w, norm) : 0.0f,
        };
#pragma unroll
        for (int i = 0; i < KEYS; ++i) mass[i] += p[i];
        *reinterpret_cast<float4*>(rows[u] + place) = make_float4(p[0], p[1], p[2], p[3]);
      }
      __syncthreads();
      // The next heads' logits are under way while these are pooled.
      const int next = head + HEADS_AT_ONCE;
      if (next < num_heads)
        read_logits(raw, own_logits + next * head_stride, head_stride, num_heads - next, inside);
      if (ours) {
#pragma unroll
        for (int u = 0; u < HEADS_AT_ONCE; ++u) {
          if (head + u >= num_heads) break;
          float means[KEYS];
          pool_row(means, rows[u] + place - halo, pool, halo);
#pragma unroll
          for (int i = 0; i < KEYS; ++i) best[i] = larger(best[i], means[i]);
        }
      }
      __syncthreads();
    }
    if (ours)
      raise(running_max + static_cast<i64>(query) * num_prompt, best, key, limit,
            num_prompt % KEYS == 0);
#pragma unroll
    for (int i = 0; i < KEYS; ++i) mass[i] /= static_cast<float>(num_heads);
    *reinterpret_cast<float4*>(rows[0] + place) = make_float4(mass[0], mass[1], mass[2], mass[3]);
    __syncthreads();
    add_chunks(panel + static_cast<i64>(query) * num_chunks, rows[0] + halo, begin, limit,
               chunk_tokens);
    __syncthreads();
  }
}

// ---- slices to one maximum and one sum -------------------------------------------------------------------
#else

extern "C" __global__ void __launch_bounds__(WARP)
    tail_combine(const float2* __restrict__ partials, float2* __restrict__ norms, int num_slices) {
  const float2* const own = partials + static_cast<i64>(blockIdx.x) * num_slices;
  float largest = negative_infinity();
  for (int slice = lane_index(); slice < num_slices; slice += WARP)
    largest = fmaxf(largest, own[slice].x);
  largest = warp_max(largest);
  float sum = 0.0f;
  for (int slice = lane_index(); slice < num_slices; slice += WARP)
    sum += own[slice].y * exp2_approx(own[slice].x - largest);
  sum = warp_sum(sum);
  if (lane_index() == 0) norms[blockIdx.x] = make_float2(largest, 1.0f / sum);
}

#endif
