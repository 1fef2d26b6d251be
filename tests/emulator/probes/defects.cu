// Kernels with one defect each; with FIXED defined, the same without it.
#include "ptx.cuh"

#ifdef FIXED
constexpr bool fixed = true;
#else
constexpr bool fixed = false;
#endif

extern "C" __global__ void half_a_warp_shuffles(float* out) {
  float own = 1.0f;
  if (fixed || lane_index() < 16) own += __shfl_xor_sync(FULL_WARP, own, 1);
  out[threadIdx.x] = own;
}

extern "C" __global__ void lanes_meet_at_different_operations(float* out) {
  float own = 1.0f;
  if (fixed || lane_index() < 16)
    own += __shfl_xor_sync(FULL_WARP, own, 1);
  else
    own += static_cast<float>(__ballot_sync(FULL_WARP, 1));
  out[threadIdx.x] = own;
}

extern "C" __global__ void shuffle_reads_outside_its_mask(float* out) {
  float own = 1.0f;
  if (lane_index() < 16) own += __shfl_xor_sync(0xffffu, own, fixed ? 8 : 16);
  out[threadIdx.x] = own;
}

extern "C" __global__ void warp_leaves_before_the_barrier(float* out) {
  out[threadIdx.x] = 1.0f;
  if (!fixed && warp_index() == 1) return;
  __syncthreads();
}

extern "C" __global__ void named_barrier_counts_too_many(float* out) {
  if (warp_index() < 2) barrier_sync(3, fixed ? 64 : 96);
  out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void barrier_in_half_a_warp(float* out) {
  if (fixed || threadIdx.x < 48) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void copy_is_not_waited_for(const float4* in, float* out) {
  __shared__ float4 slots[128];
  cp_async_16(shared_address(&slots[threadIdx.x]), in + threadIdx.x, true);
  cp_async_commit();
  if (fixed) cp_async_wait<0>();
  out[threadIdx.x] = slots[threadIdx.x].x;
}

extern "C" __global__ void wait_leaves_the_needed_group(const float4* in, float* out) {
  __shared__ float4 slots[2][128];
  for (int stage = 0; stage < 2; ++stage) {
    cp_async_16(shared_address(&slots[stage][threadIdx.x]), in + threadIdx.x, true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  out[threadIdx.x] = slots[fixed ? 0 : 1][threadIdx.x].x;
}

extern "C" __global__ void copy_overwrites_what_is_still_read(const float4* in, float* out) {
  __shared__ float4 slots[128];
  const u32 own = shared_address(&slots[threadIdx.x]);
  cp_async_16(own, in + threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  float first = slots[threadIdx.x].x;
  cp_async_16(own, in + threadIdx.x, true);
  if (!fixed) first = slots[threadIdx.x].x;
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = first;
}

extern "C" __global__ void barrier_is_missing(float* out) {
  __shared__ float slots[128];
  slots[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (fixed) __syncthreads();
  out[threadIdx.x] = slots[127 - threadIdx.x];
}

extern "C" __global__ void second_barrier_is_missing(float* out) {
  __shared__ float slot;
  float sum = 0.0f;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) slot = static_cast<float>(1 << round);
    __syncthreads();
    sum += slot;
    if (fixed) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

extern "C" __global__ void warp_barrier_is_missing(float* out) {
  __shared__ float slots[128];
  slots[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (fixed) __syncwarp();
  out[threadIdx.x] = slots[threadIdx.x ^ 1];
}

extern "C" __global__ void reads_a_row_past_the_end(const float4* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + (fixed ? 0 : 1)].x;
}

extern "C" __global__ void copies_a_row_past_the_end(const float4* in, float* out) {
  __shared__ float4 slots[128];
  cp_async_16(shared_address(&slots[threadIdx.x]), in + threadIdx.x + (fixed ? 0 : 1), true);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = slots[threadIdx.x].x;
}

extern "C" __global__ void writes_past_the_end(float* out) {
  out[threadIdx.x + (fixed ? 0 : 1)] = 1.0f;
}

extern "C" __global__ void writes_past_shared_memory(float* out) {
  SKIM_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + (fixed ? 0 : 1)] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void writes_ones_past_shared_memory(float* out) {
  SKIM_SHARED(shared);
  reinterpret_cast<u32*>(shared)[threadIdx.x + (fixed ? 0 : 1)] = FULL_WARP;
  out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void loads_a_matrix_past_shared_memory(float* out) {
  SKIM_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x] = 1.0f;
  __syncthreads();
  u32 r[4];
  ldmatrix_x4(r, shared_address(shared) + (lane_index() + (fixed ? 0 : 1)) * 16);
  out[threadIdx.x] = __uint_as_float(r[0]);
}

extern "C" __global__ void vector_is_misaligned(float* out) {
  const float4 four = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  if (threadIdx.x < 31) *reinterpret_cast<float4*>(out + 4 * threadIdx.x + (fixed ? 0 : 1)) = four;
  if (threadIdx.x == 31) out[124] = out[125] = out[126] = out[127] = 1.0f;
}

extern "C" __global__ void copy_is_misaligned(const float4* in, float* out) {
  __shared__ float4 slots[129];
  const u32 own = shared_address(&slots[threadIdx.x]) + (fixed ? 0 : 8);
  cp_async_16(own, in + threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = slots[threadIdx.x].x;
}

extern "C" __global__ void indexes_past_an_array(float* out) {
  __shared__ float slots[64];
  if (fixed ? threadIdx.x < 64 : true) slots[threadIdx.x] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void reads_shared_memory_unwritten(float* out) {
  __shared__ float slots[128];
  if (fixed || threadIdx.x != 77) slots[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = slots[threadIdx.x];
}

extern "C" __global__ void divides_by_zero(float* out) {
  const int size = static_cast<int>(gridDim.x) - (fixed ? 0 : 1);
  out[threadIdx.x] = static_cast<float>(static_cast<int>(threadIdx.x) / size);
}
