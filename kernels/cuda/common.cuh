// Types, constants, bf16 conversion and warp reductions that every kernel shares.
//
// Included first by each kernel. Needs no standard header and holds no assembly (that is ptx.cuh
// and hopper.cuh). The tests compile the same text with a C++ compiler and run it on the CPU: they
// define SKIM_EMULATED and give the CUDA language by a header of their own.
//
// bf16 is kept as its 16 raw bits. Rows are row-major. Nothing here synchronises more than a warp.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef u16 bf16;  // raw bits

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "fixed widths");

constexpr int BLOCK_TOKENS = 128;  // tokens of an attention block and of a query tile
constexpr int WARP = 32;
constexpr u32 FULL_WARP = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f;  // exp(x) = exp2(x * LOG2E)
constexpr float LOG2_BLOCK_TOKENS = 7.0f;     // a block's mean stands for 128 tokens

// Dynamic shared memory of the block as bytes, 1024-byte aligned, which the 128-byte swizzle asks.
#ifdef SKIM_EMULATED
#define SKIM_SHARED(name) unsigned char* const name = emu::dynamic_shared()
#else
#define SKIM_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// Blocks are one-dimensional.
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / WARP; }

// ---- bf16 ---------------------------------------------------------------------------------------

__device__ __forceinline__ float bf16_to_float(bf16 bits) {
  return __uint_as_float(static_cast<u32>(bits) << 16);
}

// Round to nearest, ties to even; any NaN becomes 0x7fff, as cvt.rn.bf16 makes it.
__device__ __forceinline__ bf16 float_to_bf16(float value) {
  const u32 bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The two halves of a register that holds two bf16: element 0 is the low half.
__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// ---- reductions in a warp: the same order and so the same bits in every lane --------------------

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(FULL_WARP, value, distance);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
  return value;
}

// Over the four lanes 4g .. 4g+3, which together hold one row of an mma accumulator.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(FULL_WARP, value, 1);
  return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 1));
  return fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 2));
}
