// Bias, per-head RMS norm and rotary positions of the projected heads, in place and in one pass.
//
//   qkv  bf16, one row per token, `row_stride` elements apart: num_q query heads, num_k key heads,
//        num_v value heads of HEAD_DIM, side by side (any of the counts may be 0)
//   q, k heads:  z = x + bias;  z = z / sqrt(mean(z^2) + epsilon) * norm;  pairs (z_i, z_{i + d/2})
//                turned by the angle of pair i at the row's position, times `magnitude`
//   v heads:     z = x + bias
//   bias    float32 [(num_q + num_k + num_v) * HEAD_DIM] or null
//   q_norm, k_norm  float32 [HEAD_DIM] or null
//   turns   uint64 [HEAD_DIM / 2], turns per position in units of 2^-64 turn
//   position of row r: positions ? positions[r] : first_position + r
//
// Angles: position * turns modulo 2^64 is the fraction of a turn, exact but for the rounding of
// `turns` (2^-65 turn, times a position under 2^31). Its upper 32 bits as a signed number are an angle
// in [-pi, pi), off by at most 2^-33 turn + two roundings of a float (5e-7 radians in all) at any
// position; there the fast sine and cosine are good to 2^-21. A bf16 result is rounded by 2^-8.
//
// A team of HEAD_DIM / 16 lanes holds one row: its sines and cosines are computed once for all heads,
// which pass by four at a time, eight 16-byte reads in flight in each lane.
// Grid: ceil(num_rows * HEAD_DIM / 16 / 256). Block: 256. Shared: none.
// Limits: HEAD_DIM 64, 128, 256; qkv, bias, norms, turns 16-byte aligned; row_stride % 8 == 0.
// Traffic: 4 bytes an element of the turned heads.
// Reference: rmsnorm, rope_tables, apply_rope (drafter_svc/layer_math.py `rotate`).
// Measured (H100, a layer of Qwen3-0.6B at 131,072 tokens): 0.569 ms, 2.8 TB/s.
#include "vectors.cuh"

constexpr int THREADS = 256;
constexpr int HALF = HEAD_DIM / 2;
constexpr int TEAM = HALF / VECTOR;  // lanes of a row: each holds 8 components of either half
constexpr int HEADS_IN_FLIGHT = 4;
constexpr float RADIANS_PER_STEP = 1.4629180792671596e-9f;  // 2 pi / 2^32

struct Angles {
  float cosine[VECTOR], sine[VECTOR];
};

__device__ __forceinline__ Angles angles_at(int position, const u64* turns, float magnitude) {
  Angles angles;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const u64 fraction = static_cast<u64>(static_cast<u32>(position)) * turns[i];
    const float angle = static_cast<float>(static_cast<int>(fraction >> 32)) * RADIANS_PER_STEP;
    angles.cosine[i] = magnitude * __cosf(angle);
    angles.sine[i] = magnitude * __sinf(angle);
  }
  return angles;
}

__device__ __forceinline__ void add_floats(const float* address, float (&values)[VECTOR]) {
  float added[VECTOR];
  load_floats(address, added);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) values[i] += added[i];
}

// 1 / rms of the head that the team's lanes hold together.
__device__ __forceinline__ float inverse_rms(const float (&low)[VECTOR],
                                             const float (&high)[VECTOR], float epsilon) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) squares += low[i] * low[i] + high[i] * high[i];
#pragma unroll
  for (int distance = TEAM / 2; distance > 0; distance /= 2)
    squares += __shfl_xor_sync(FULL_WARP, squares, distance);
  return rsqrtf(squares / static_cast<float>(HEAD_DIM) + epsilon);
}

// Turn `count` heads that start at `heads`; the addresses are those of the lane's low components.
__device__ __forceinline__ void turn_heads(bf16* heads, const float* bias, const float* norm,
                                           int count, bool real_row, float epsilon,
                                           const Angles& angles) {
  float norm_low[VECTOR], norm_high[VECTOR];
  if (norm) {
    load_floats(norm, norm_low);
    load_floats(norm + HALF, norm_high);
  }
  for (int head = 0; head < count; head += HEADS_IN_FLIGHT) {
    uint4 raw_low[HEADS_IN_FLIGHT], raw_high[HEADS_IN_FLIGHT];
#pragma unroll
    for (int u = 0; u < HEADS_IN_FLIGHT; ++u) {
      const bf16* const source = heads + min(head + u, count - 1) * HEAD_DIM;
      raw_low[u] = load_vector(source);
      raw_high[u] = load_vector(source + HALF);
    }
#pragma unroll
    for (int u = 0; u < HEADS_IN_FLIGHT; ++u) {
      if (head + u >= count) break;
      float low[VECTOR], high[VECTOR];
      unpack_vector(raw_low[u], low);
      unpack_vector(raw_high[u], high);
      if (bias) {
        add_floats(bias + (head + u) * HEAD_DIM, low);
        add_floats(bias + (head + u) * HEAD_DIM + HALF, high);
      }
      if (norm) {
        const float scale = inverse_rms(low, high, epsilon);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          low[i] *= scale * norm_low[i];
          high[i] *= scale * norm_high[i];
        }
      }
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const float first = low[i], second = high[i];
        low[i] = first * angles.cosine[i] - second * angles.sine[i];
        high[i] = first * angles.sine[i] + second * angles.cosine[i];
      }
      if (real_row) {
        store_vector(heads + (head + u) * HEAD_DIM, pack_vector(low));
        store_vector(heads + (head + u) * HEAD_DIM + HALF, pack_vector(high));
      }
    }
  }
}

__device__ __forceinline__ void add_bias(bf16* heads, const float* bias, int count) {
  for (int half = 0; half < 2 * count; ++half) {
    float values[VECTOR];
    unpack_vector(load_vector(heads + half * HALF), values);
    add_floats(bias + half * HALF, values);
    store_vector(heads + half * HALF, pack_vector(values));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_rope(bf16* __restrict__ qkv, const u64* __restrict__ turns,
                 const int* __restrict__ positions, const float* __restrict__ q_norm,
                 const float* __restrict__ k_norm, const float* __restrict__ bias, int row_stride,
                 int num_rows, int first_position, int num_q, int num_k, int num_v, float epsilon,
                 float magnitude) {
  const int thread = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  const int row = thread / TEAM;
  const int column = VECTOR * (thread % TEAM);
  // Teams past the end repeat the last row and write nothing: a warp's shuffles need all its lanes.
  const bool real_row = row < num_rows;
  const int read_row = min(row, num_rows - 1);
  const int position = positions ? positions[read_row] : first_position + read_row;
  const Angles angles = angles_at(position, turns + column, magnitude);

  bf16* const heads = qkv + static_cast<i64>(read_row) * row_stride + column;
  const float* const own_bias = bias ? bias + column : nullptr;
  turn_heads(heads, own_bias, q_norm ? q_norm + column : nullptr, num_q, real_row, epsilon, angles);
  const int keys = num_q * HEAD_DIM;
  turn_heads(heads + keys, bias ? own_bias + keys : nullptr, k_norm ? k_norm + column : nullptr,
             num_k, real_row, epsilon, angles);
  const int values = keys + num_k * HEAD_DIM;
  if (bias && real_row) add_bias(heads + values, own_bias + values, num_v);
}
