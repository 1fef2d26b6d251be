// How much softmax mass each tile of queries would give each block of keys, judged by the block's
// mean key.
//
// Maths, for query head h, tile I (128 positions i) and block J <= I:
//   s_iJ = scale q_i . k_mean_J     for the positions i >= the last token of J: all of the tile for
//                                   J < I, only its last one for J = I
//   m_IJ = max_i s_iJ,   S_IJ = sum_i exp(s_iJ - m_IJ)
//   mass_IJ = S_IJ exp(m_IJ - max_J m_IJ)
//
// Shapes:  q        bf16 [num_tokens, heads * HEAD_DIM], rows `row_stride` elements apart
//          k_mean   bf16 [kv_heads, num_blocks, HEAD_DIM]; query head h reads h / group
//          mass     float32 [heads, num_blocks (tiles), num_blocks]; entries J > I are not written
// Grid:    (heads, num_blocks); the last, longest tiles start first. 128 threads.
// Shared:  the queries as panels of 64 columns: 16, 32, 64 KiB for HEAD_DIM 64, 128, 256; for each
//          warp two stages of its means x 64 columns: 32 KiB (16 for 256); (m, S): 8 bytes a block.
// Limits:  HEAD_DIM 64, 128 or 256; 16-byte aligned rows. The 99 KiB of sm_89 hold 6,528, 4,480 or
//          2,432 blocks (of 128 tokens); the 163 KiB of sm_80 more.
// Source:  FlashPrefill (arXiv:2603.06199). Reference: kernels/reference/block_score.py.
// Measured (H100, a layer of Qwen3-0.6B at 131,072 tokens): 0.962 ms.
//
// The means are the rows of the product (means x queries): a warp has 32 (16) of the 128 (64) means
// in work against all queries, so that a sum over queries is one over a thread's own registers and
// two shuffles. A warp copies its own means, so the warps meet only at both ends of the kernel.

#include "common.cuh"
#include "ptx.cuh"

constexpr int WARPS = 4;
constexpr int M_TILES = HEAD_DIM <= 128 ? 2 : 1;  // of 16 means
constexpr int MEANS = M_TILES * 16;               // of a warp
constexpr int PANELS = HEAD_DIM / 64;             // 64 columns are the 128 bytes of a swizzled row
constexpr int Q_BYTES = BLOCK_TOKENS * HEAD_DIM * 2;
constexpr int STAGE_BYTES = MEANS * 128;

// Byte offset of the 16-byte piece `piece` of row `row` in a panel: the exclusive or spreads one
// column of pieces over all banks.
__device__ __forceinline__ u32 swizzled(int row, int piece) {
  return row * 128 + ((piece ^ row) & 7) * 16;
}

// Start copying one panel of MEANS means from `first` on; past `last` that one again, since nobody
// reads what comes of it.
__device__ __forceinline__ void load_means(u32 stage, const bf16* k_mean, int first, int last,
                                           int panel) {
  const int row = lane_index() / 8, piece = lane_index() % 8;
#pragma unroll 2
  for (int begin = 0; begin < MEANS; begin += 4) {
    const int block = min(first + begin + row, last);
    cp_async_16(stage + swizzled(begin + row, piece),
                k_mean + static_cast<i64>(block) * HEAD_DIM + panel * 64 + piece * 8, true);
  }
  cp_async_commit();
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 3)
block_score(const bf16* q, const bf16* k_mean, float* mass, int row_stride, int num_tokens,
            int num_blocks, int group, float scale_log2) {
  SKIM_SHARED(shared);
  float2* const row = reinterpret_cast<float2*>(shared + Q_BYTES + WARPS * 2 * STAGE_BYTES);
  const u32 q_tile = shared_address(shared);
  const u32 stages = q_tile + Q_BYTES + warp_index() * 2 * STAGE_BYTES;
  const int lane = lane_index();

  const int head = blockIdx.x, tile = gridDim.y - 1 - blockIdx.y;
  const int rows = min(BLOCK_TOKENS, num_tokens - tile * BLOCK_TOKENS);
  q += static_cast<i64>(tile) * BLOCK_TOKENS * row_stride + head * HEAD_DIM;
  k_mean += static_cast<i64>(head / group) * num_blocks * HEAD_DIM;

  for (int i = threadIdx.x; i < BLOCK_TOKENS * PANELS * 8; i += WARPS * WARP) {
    const int query = i / (PANELS * 8), piece = i % (PANELS * 8);
    const bool valid = query < rows;
    cp_async_16(q_tile + piece / 8 * BLOCK_TOKENS * 128 + swizzled(query, piece % 8),
                q + static_cast<i64>(valid ? query : 0) * row_stride + piece * 8, valid);
  }
  cp_async_commit();
  int first = warp_index() * MEANS;  // of the means in work
  if (first <= tile) load_means(stages, k_mean, first, tile, 0);
  cp_async_wait<0>();
  __syncthreads();

  // Where this lane reads in ldmatrix (the operands of ptx.cuh: means left, queries right); 16
  // columns further along a panel's row flip bits of the address.
  const u32 mean_lane = stages + swizzled(lane % 16, lane / 16);
  const u32 query_lane = q_tile + swizzled(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  int panels_read = 0;
  for (; first <= tile; first += WARPS * MEANS) {
    float logits[M_TILES][16][4] = {};
#pragma unroll 1
    for (int panel = 0; panel < PANELS; ++panel, ++panels_read) {
      cp_async_wait<0>();
      __syncwarp();  // this panel is there, and every lane is done with the last one
      const bool last_panel = panel == PANELS - 1;
      const int next_first = last_panel ? first + WARPS * MEANS : first;
      if (next_first <= tile)
        load_means(stages + (panels_read + 1) % 2 * STAGE_BYTES, k_mean, next_first, tile,
                   last_panel ? 0 : panel + 1);
      const u32 mean_panel = mean_lane + panels_read % 2 * STAGE_BYTES;
      const u32 query_panel = query_lane + panel * BLOCK_TOKENS * 128;
#pragma unroll 1  // unrolled, it spills
      for (int flip = 0; flip < 128; flip += 32) {
        u32 a[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) ldmatrix_x4(a[m], (mean_panel ^ flip) + m * 16 * 128);
#pragma unroll
        for (int n = 0; n < 16; n += 2) {
          u32 b[4];
          ldmatrix_x4(b, (query_panel ^ flip) + n * 8 * 128);
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) {
            mma_m16n8k16(logits[m][n], a[m], b[0], b[1]);
            mma_m16n8k16(logits[m][n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int block = first + m * 16 + half * 8 + lane / 4;
        if (rows < BLOCK_TOKENS || first + MEANS > tile) {
          const int first_query = block == tile ? rows - 1 : 0;
#pragma unroll
          for (int n = 0; n < 16; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int query = n * 8 + lane % 4 * 2 + e;
              if (query < first_query || query >= rows)
                logits[m][n][half * 2 + e] = negative_infinity();
            }
          }
        }
        float peak = negative_infinity();
#pragma unroll
        for (int n = 0; n < 16; ++n)
          peak = fmaxf(peak, fmaxf(logits[m][n][half * 2], logits[m][n][half * 2 + 1]));
        peak = quad_max(peak) * scale_log2;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e)
            sum += exp2_approx(fmaf(logits[m][n][e], scale_log2, -peak));
        }
        sum = quad_sum(sum);
        if (lane % 4 == 0 && block <= tile) row[block] = make_float2(peak, sum);
      }
    }
  }
  __syncthreads();

  float largest = negative_infinity();  // of the whole row; each warp finds it for itself
  for (int block = lane; block <= tile; block += WARP) largest = fmaxf(largest, row[block].x);
  largest = warp_max(largest);
  mass += (static_cast<i64>(head) * num_blocks + tile) * num_blocks;
  for (int block = threadIdx.x; block <= tile; block += WARPS * WARP)
    mass[block] = row[block].y * exp2_approx(row[block].x - largest);
}
