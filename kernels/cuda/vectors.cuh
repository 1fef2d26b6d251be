// Sixteen bytes at a time: eight bf16 to and from float, for the kernels that only move memory.
//
// A thread that reads 16 bytes asks for as much as the memory system takes from it at once. All
// addresses are 16-byte aligned.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

constexpr int VECTOR = 8;  // bf16 in 16 bytes

__device__ __forceinline__ uint4 load_vector(const bf16* address) {
  return *reinterpret_cast<const uint4*>(address);
}

__device__ __forceinline__ void store_vector(bf16* address, uint4 raw) {
  *reinterpret_cast<uint4*>(address) = raw;
}

__device__ __forceinline__ void unpack_vector(uint4 raw, float (&values)[VECTOR]) {
  values[0] = low_bf16(raw.x), values[1] = high_bf16(raw.x);
  values[2] = low_bf16(raw.y), values[3] = high_bf16(raw.y);
  values[4] = low_bf16(raw.z), values[5] = high_bf16(raw.z);
  values[6] = low_bf16(raw.w), values[7] = high_bf16(raw.w);
}

__device__ __forceinline__ uint4 pack_vector(const float (&values)[VECTOR]) {
  uint4 raw;
  raw.x = pack_bf16x2(values[0], values[1]);
  raw.y = pack_bf16x2(values[2], values[3]);
  raw.z = pack_bf16x2(values[4], values[5]);
  raw.w = pack_bf16x2(values[6], values[7]);
  return raw;
}

// Eight floats, as two reads of 16 bytes.
__device__ __forceinline__ void load_floats(const float* address, float (&values)[VECTOR]) {
  const float4 first = *reinterpret_cast<const float4*>(address);
  const float4 second = *reinterpret_cast<const float4*>(address + 4);
  values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
  values[4] = second.x, values[5] = second.y, values[6] = second.z, values[7] = second.w;
}
