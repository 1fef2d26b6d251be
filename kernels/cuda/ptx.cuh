// The machine instructions of the portable kernels (sm_80 and up): all inline PTX but hopper.cuh's.
//
// Layouts are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "ldmatrix"). In every
// table lane = 4 g + t with g = lane / 4 (0..7) and t = lane % 4. A register of two bf16 holds the
// element with the lower index in its low half.
//
//   mma_m16n8k16: C[16, 8] += A[16, 16] B[16, 8], fp32 sums of bf16 products
//     a[0] = A[g    ][2t, 2t+1]        a[1] = A[g + 8][2t, 2t+1]
//     a[2] = A[g    ][2t+8, 2t+9]      a[3] = A[g + 8][2t+8, 2t+9]
//     b0   = B[2t, 2t+1][g]            b1   = B[2t+8, 2t+9][g]
//     c[0], c[1] = C[g][2t], C[g][2t+1]          c[2], c[3] = C[g + 8][2t], C[g + 8][2t+1]
//   Two accumulators side by side (columns 0..7 and 8..15) are, packed to bf16, an A operand:
//     a[0], a[1] = pack(c0[0], c0[1]), pack(c0[2], c0[3]);  a[2], a[3] the same of c1.
//
//   ldmatrix_x4: four 8x8 matrices of bf16; lane 8 i + r gives the address of row r of matrix i (16
//     bytes, 16-byte aligned); afterwards r[i] = matrix_i[g][2t, 2t+1].
//   ldmatrix_x4_trans: the same addresses; afterwards r[i] = matrix_i[2t, 2t+1][g].
//   So, with S row-major in shared memory:
//     A operand from S[m][k]: row = m0 + lane % 16, column = k0 + (lane / 16) * 8; r = a.
//     B operand from S[n][k] (K of attention), 16 rows n0..n0+15: row = n0 + lane % 8 +
//       (lane / 16) * 8, column = k0 + (lane / 8 % 2) * 8; r[0], r[1] = b0, b1 of n0..n0+7;
//       r[2], r[3] of n0+8..n0+15.
//     B operand from S[k][n] (V of attention), with _trans, 16 columns n0..n0+15: row = k0 +
//       lane % 16, column = n0 + (lane / 16) * 8; r[0], r[1] = b0, b1 of n0..n0+7; r[2], r[3] of
//       n0+8..n0+15.
//
// Asynchronous copies belong to the thread that issued them: it waits, then a barrier, then others
// may read.
#pragma once

#include "common.cuh"

#ifdef SKIM_EMULATED
#include "emulated_ptx.h"
#else

// Address in the shared window, as ldmatrix, cp.async, mbarrier and wgmma take it.
__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Start copying 16 bytes from global to shared memory (both 16-byte aligned), past L1. With
// valid == false nothing is read and the 16 bytes become zero.
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Close a group: all copies of this thread since the last one.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most PENDING of this thread's latest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_row)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_row)
               : "memory");
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to about 2 ulp; 2^-inf = 0; results below the normal range become zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats, each rounded to the nearest bf16 (ties to even); `low` goes to the low half.
__device__ __forceinline__ u32 pack_bf16x2(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// IEEE half (raw bits) to float, exact: the scales of quantised weights.
__device__ __forceinline__ float half_to_float(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Named barriers: `id` 1..15 (0 is __syncthreads), `threads` a multiple of 32: how many arrive and
// wait together. Whole warps call them. They order shared memory as __syncthreads does.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

#endif
