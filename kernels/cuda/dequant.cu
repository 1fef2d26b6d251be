// Weights as they stand in a GGUF file to bf16, rounded once to the nearest.
//
//   source  whole blocks of GGML_TYPE, 16-byte aligned     target  bf16 [num_values], 16-byte aligned
//
//   type   block: values, bytes        value
//   F32 (0), F16 (1), BF16 (30)        the number itself
//   Q8_0 (8)     32,  34               d * q,          q int8
//   Q4_K (12)   256, 144               d * s * q - dmin * m,  q 4 bits; s, m 6 bits per 32 values
//   Q5_K (13)   256, 176               the same with q of 5 bits
//   Q6_K (14)   256, 210               d * s * (q - 32), q 6 bits; s int8 per 16 values
//
// Every product is exact in fp32 (at most 24 significant bits), so contraction changes nothing and the
// result is bit for bit the reference's, rounded to bf16.
// A block of threads takes 8,192 values: it copies their bytes to shared memory, 16 at a time (blocks
// of 34 and 210 bytes are not aligned to more than 2), and each thread makes four times 8 values of them.
// Grid: ceil(num_values / 8192). Block: 256. Shared: up to 32 KiB, static.
// Limits: num_values is whole blocks. Reference: the gguf package's dequantize, round_to_bf16.
// Measured (H100): 151,936 x 1,024 values in 0.14 (Q4_K) to 0.31 ms (F32), 2.5 to 3.0 TB/s.
#include "vectors.cuh"

constexpr int THREADS = 256;
constexpr int VALUES = 8192;  // of a block of threads: whole blocks of every type, and 16-byte multiples

#if GGML_TYPE == 0
constexpr int BLOCK_VALUES = 1, BLOCK_BYTES = 4;
#elif GGML_TYPE == 1 || GGML_TYPE == 30
constexpr int BLOCK_VALUES = 1, BLOCK_BYTES = 2;
#elif GGML_TYPE == 8
constexpr int BLOCK_VALUES = 32, BLOCK_BYTES = 34;
#elif GGML_TYPE == 12
constexpr int BLOCK_VALUES = 256, BLOCK_BYTES = 144;
#elif GGML_TYPE == 13
constexpr int BLOCK_VALUES = 256, BLOCK_BYTES = 176;
#elif GGML_TYPE == 14
constexpr int BLOCK_VALUES = 256, BLOCK_BYTES = 210;
#endif
constexpr int TILE_BYTES = VALUES / BLOCK_VALUES * BLOCK_BYTES;
static_assert(TILE_BYTES % 16 == 0, "tiles start on 16 bytes");

// Blocks are aligned to 2 bytes only, so that is how they are read.
__device__ __forceinline__ u16 read_u16(const u8* at) { return *reinterpret_cast<const u16*>(at); }
__device__ __forceinline__ float read_half(const u8* at) { return half_to_float(read_u16(at)); }

__device__ __forceinline__ void read_bytes(const u8* at, u32 (&bytes)[VECTOR]) {
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) {
    const u32 two = read_u16(at + i);
    bytes[i] = two & 0xff;
    bytes[i + 1] = two >> 8;
  }
}

#if GGML_TYPE == 12 || GGML_TYPE == 13
// Scale and minimum of 32 values: 6 bits each, eight of both packed in 12 bytes.
__device__ __forceinline__ void scale_and_minimum(const u8* packed, int group, float* scale,
                                                  float* minimum) {
  u32 s, m;
  if (group < 4) {
    s = packed[group] & 63;
    m = packed[group + 4] & 63;
  } else {
    s = (packed[group + 4] & 15) | (packed[group - 4] >> 6 << 4);
    m = (packed[group + 4] >> 4) | (packed[group] >> 6 << 4);
  }
  *scale = static_cast<float>(s);
  *minimum = static_cast<float>(m);
}
#endif

// Values [first, first + 8) of the tile; `first` is a multiple of 8.
__device__ __forceinline__ void decode(const u8* tile, int first, float (&values)[VECTOR]) {
#if GGML_TYPE == 0
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) values[i] = reinterpret_cast<const float*>(tile)[first + i];
#elif GGML_TYPE == 1
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) values[i] = read_half(tile + 2 * (first + i));
#elif GGML_TYPE == 30
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) values[i] = bf16_to_float(read_u16(tile + 2 * (first + i)));
#else
  const u8* const block = tile + first / BLOCK_VALUES * BLOCK_BYTES;
  const int at = first % BLOCK_VALUES;
  u32 bytes[VECTOR];
#if GGML_TYPE == 8
  const float d = read_half(block);
  read_bytes(block + 2 + at, bytes);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i)
    values[i] = d * static_cast<float>(static_cast<signed char>(bytes[i]));
#elif GGML_TYPE == 12 || GGML_TYPE == 13
  const int group = at / 32;
  float scale, minimum;
  scale_and_minimum(block + 4, group, &scale, &minimum);
  scale *= read_half(block);
  minimum *= read_half(block + 2);
  const int shift = group % 2 * 4;  // two groups share their bytes: low and high nibbles
  read_bytes(block + BLOCK_BYTES - 128 + group / 2 * 32 + at % 32, bytes);
#if GGML_TYPE == 13
  u32 high[VECTOR];
  read_bytes(block + 16 + at % 32, high);
#endif
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    u32 q = bytes[i] >> shift & 15;
#if GGML_TYPE == 13
    q |= (high[i] >> group & 1) << 4;
#endif
    values[i] = scale * static_cast<float>(q) - minimum;
  }
#elif GGML_TYPE == 14
  const int half = at / 128, quarter = at % 128 / 32;
  const int scale = static_cast<signed char>(block[192 + at / 16]);
  const float d = read_half(block + 208) * static_cast<float>(scale);
  u32 high[VECTOR];
  read_bytes(block + half * 64 + at % 64, bytes);
  read_bytes(block + 128 + half * 32 + at % 32, high);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const u32 q = (bytes[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (2 * quarter) & 3) << 4;
    values[i] = d * static_cast<float>(static_cast<int>(q) - 32);
  }
#endif
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dequant(const u8* __restrict__ source, bf16* __restrict__ target, i64 num_values) {
  __shared__ uint4 staged[TILE_BYTES / 16];
  u8* const tile = reinterpret_cast<u8*>(staged);
  const i64 first = static_cast<i64>(blockIdx.x) * VALUES;
  const i64 begin = first / BLOCK_VALUES * BLOCK_BYTES;
  const i64 rest = num_values / BLOCK_VALUES * BLOCK_BYTES - begin;
  const int num_bytes = rest < TILE_BYTES ? static_cast<int>(rest) : TILE_BYTES;
  const int vectors = num_bytes / 16;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < vectors; i += THREADS)
    staged[i] = reinterpret_cast<const uint4*>(source + begin)[i];
  const int last = 16 * vectors + static_cast<int>(threadIdx.x);
  if (last < num_bytes) tile[last] = source[begin + last];
  __syncthreads();

#pragma unroll
  for (int part = 0; part < VALUES / (THREADS * VECTOR); ++part) {
    const int at = VECTOR * (part * THREADS + static_cast<int>(threadIdx.x));
    const i64 left = num_values - first - at;
    if (left <= 0) return;
    float values[VECTOR];
    decode(tile, at, values);
    if (left >= VECTOR) {
      store_vector(target + first + at, pack_vector(values));
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        if (i < left) target[first + at + i] = float_to_bf16(values[i]);
    }
  }
}
