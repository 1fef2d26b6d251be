// Mean key and mean value of each block of 128 tokens: what a pruned block is judged and stood for by.
//
//   k, v            bf16, one row per token, `row_stride` elements apart; KV head h at column h * head_dim
//   k_mean, v_mean  bf16 [num_kv_heads, num_blocks, head_dim]; means over the block's real tokens,
//                   summed in fp32 in a fixed order
//
// One block of threads takes 256 columns of one block of tokens: 32 lanes of 16 bytes side by side,
// eight warps over the rows. A warp's read is 512 contiguous bytes.
// Grid: (ceil(width / 256), num_blocks, 2), width = num_kv_heads * head_dim; z = 0: keys, 1: values.
// Block: 256. Shared: 8 KiB, static. Limits: head_dim % 8 == 0, row_stride % 8 == 0, 16-byte aligned.
// Traffic: 4 * width bytes a token. Reference: block_mean.
// Measured (H100, a layer of Qwen3-0.6B at 131,072 tokens): 0.186 ms, 2.9 TB/s.
#include "vectors.cuh"

constexpr int WARPS = 8;
constexpr int ROWS = BLOCK_TOKENS / WARPS;  // of a warp
constexpr int READS = 8;                    // in flight in each thread
constexpr int COLUMNS = WARP * VECTOR;

// Sum the warp's rows of the thread's columns. Whole blocks have no conditions, which would let the
// compiler move each read to where it is used.
template <bool WHOLE>
__device__ __forceinline__ void sum_rows(float (&sums)[VECTOR], const bf16* source, int row_stride,
                                         int tokens) {
  for (int begin = 0; begin < ROWS; begin += READS) {
    uint4 raw[READS];
#pragma unroll
    for (int i = 0; i < READS; ++i) {
      const int token = (begin + i) * WARPS + warp_index();
      raw[i] = make_uint4(0, 0, 0, 0);
      if (WHOLE || token < tokens)
        raw[i] = load_vector(source + static_cast<i64>(token) * row_stride);
    }
#pragma unroll
    for (int i = 0; i < READS; ++i) {
      float values[VECTOR];
      unpack_vector(raw[i], values);
#pragma unroll
      for (int c = 0; c < VECTOR; ++c) sums[c] += values[c];
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    block_mean(const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ k_mean,
               bf16* __restrict__ v_mean, int row_stride, int num_tokens, int width, int head_dim) {
  __shared__ float partial[WARPS][COLUMNS];
  const int block = static_cast<int>(blockIdx.y);
  const int first = block * BLOCK_TOKENS;
  const int tokens = min(BLOCK_TOKENS, num_tokens - first);
  const int column = static_cast<int>(blockIdx.x) * COLUMNS + VECTOR * lane_index();
  const bf16* const source =
      (blockIdx.z == 0 ? k : v) + static_cast<i64>(first) * row_stride + column;

  float sums[VECTOR] = {};
  if (column < width) {
    if (tokens == BLOCK_TOKENS)
      sum_rows<true>(sums, source, row_stride, tokens);
    else
      sum_rows<false>(sums, source, row_stride, tokens);
  }
  float4* const own = reinterpret_cast<float4*>(&partial[warp_index()][VECTOR * lane_index()]);
  own[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  own[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
  __syncthreads();

  const int mine = static_cast<int>(blockIdx.x) * COLUMNS + static_cast<int>(threadIdx.x);
  if (mine >= width) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += partial[w][threadIdx.x];
  const i64 head_block = static_cast<i64>(mine / head_dim) * gridDim.y + block;
  (blockIdx.z == 0 ? k_mean : v_mean)[head_block * head_dim + mine % head_dim] =
      float_to_bf16(sum / static_cast<float>(tokens));
}
