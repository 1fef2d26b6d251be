// The machine instructions of the Hopper kernels (sm_90a): mbarrier, TMA, wgmma, register budgets.
//
// A matrix in shared memory, 128-byte swizzle: a panel of 64 bf16 columns is rows of 128 bytes, and
// byte address bits 4..6 are XORed with bits 7..9; panels start at multiples of 1,024 bytes. So the
// copy engine writes it (tma_load_2d, a box of 64 columns) and so wgmma reads it. The descriptor:
//   bits 0..13 address >> 4 | 16..29 leading bytes >> 4 | 32..45 stride bytes >> 4 | 62..63 = 1
// (base offset 0). Adding bytes >> 4 to a descriptor moves its start.
//   K-major operand X[row][k] (A always, B of wgmma_ss): element (r, k) lies, before the XOR,
//     at start + (r / 8) stride + (r % 8) 128 + 2 k; stride = 1,024; leading is not used. The next
//     16 k are 32 bytes on, the next 64 are in the next panel.
//   MN-major operand X[k][n] (B of wgmma_rs, V of attention): element (k, n) lies, before the XOR,
//     at start + (n / 64) leading + 2 (n % 64) + (k / 8) stride + (k % 8) 128; leading = bytes of
//     a panel, stride = 1,024. The next 16 k are 2,048 bytes on.
//
// Registers of a warpgroup (4 warps, the first one's index a multiple of 4), warp w of it,
// g = lane / 4, t = lane % 4: d[4 j + 2 h + e] = D[16 w + g + 8 h][8 j + 2 t + e]. A in registers:
// a[0..3] as for mma_m16n8k16 (ptx.cuh), of rows 16 w .. 16 w + 15; so accumulators pack to it in
// the same way.
//
// Order, each time: wgmma_fence, the products, wgmma_commit, wgmma_wait. From the first to the wait
// the accumulators belong to the tensor cores: neither read nor write them. Name them in the wait,
// or the compiler may move their use before it. Shared memory written by ordinary stores needs
// fence_proxy_async and a barrier before wgmma or TMA touch it.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error "hopper.cuh needs sm_90a: wgmma and setmaxnreg exist nowhere else"
#endif

// A tensor map, as a kernel takes it: `const __grid_constant__ TMap`.
struct alignas(64) TMap {
  unsigned char bytes[128];
};

#ifdef SKIM_EMULATED
#include "emulated_hopper.h"
#else

// ---- mbarrier: 8 bytes of shared memory, 8-byte aligned -----------------------------------------

__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// After the last mbarrier_init, before the barrier that lets the others see them.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n\t"
      "fence.proxy.async.shared::cta;" ::
          : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
}

// One arrival, and `bytes` more that copies must bring before the phase is complete.
__device__ __forceinline__ void mbarrier_arrive_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Wait until the phase of this parity is over. Phases count from 0: a fresh barrier lets parity 1
// pass.
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}"
      :
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
}

// ---- copy engine --------------------------------------------------------------------------------

// Copy the box at element column x, row y; what lies outside the matrix becomes zero. One thread
// calls it; the bytes of the whole box count towards the barrier. `shared` is 1,024-byte aligned.
__device__ __forceinline__ void tma_load_2d(void* shared, const TMap* map, int x, int y,
                                            u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_prefetch_map(const TMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// Order this thread's ordinary accesses to shared memory before those of TMA and wgmma that follow.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- warps --------------------------------------------------------------------------------------

// True in one lane of a converged warp.
__device__ __forceinline__ bool elect_one() {
  u32 elected;
  asm volatile(
      "{\n\t"
      ".reg .pred chosen;\n\t"
      "elect.sync _|chosen, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, chosen;\n\t"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// Change the register budget of a thread: all warps of a warpgroup call it, once, at the head of
// their role; the kernel has __launch_bounds__(threads, 1). 24 to 256 in steps of 8.
template <int REGISTERS>
__device__ __forceinline__ void registers_release() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0, "a budget");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void registers_claim() {
  static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0, "a budget");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}

// ---- wgmma --------------------------------------------------------------------------------------

__device__ __forceinline__ u64 wgmma_descriptor(const void* shared, u32 leading_bytes,
                                                u32 stride_bytes) {
  return static_cast<u64>((shared_address(shared) & 0x3ffffu) >> 4) |
         static_cast<u64>((leading_bytes & 0x3ffffu) >> 4) << 16 |
         static_cast<u64>((stride_bytes & 0x3ffffu) >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// No instruction: the compiler sees the registers change here and keeps their use behind it.
template <int COUNT>
__device__ __forceinline__ void wgmma_hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Wait until at most PENDING of the latest groups are under way; `d`: accumulators then ready.
template <int PENDING, class... Accumulators>
__device__ __forceinline__ void wgmma_wait(Accumulators&... d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
  (wgmma_hold(d), ...);
}

// D[64, N] = A[64, 16] B[16, N] (+ D if accumulate); A and B K-major in shared memory. N: 64, 128.
template <int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], u64 a, u64 b, bool accumulate);

// The same with A in registers and B MN-major. N: 64, 128, 256.
template <int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b,
                                         bool accumulate);

// The lists of registers: operands %0 .. and their constraints.
#define SKIM_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SKIM_D16(i) SKIM_D4(i), SKIM_D4(i + 4), SKIM_D4(i + 8), SKIM_D4(i + 12)
#define SKIM_D32(i) SKIM_D16(i), SKIM_D16(i + 16)
#define SKIM_D64(i) SKIM_D32(i), SKIM_D32(i + 32)
#define SKIM_A4 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define SKIM_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SKIM_R64 \
  SKIM_R32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SKIM_R128 \
  SKIM_R64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// p is scale-d (keep D); 1, 1: A and B not negated; then which of those in memory is transposed.
#define SKIM_WGMMA(shape, operands, flag, modes)                                           \
  "{\n\t"                                                                                  \
  ".reg .pred p;\n\t"                                                                      \
  "setp.ne.b32 p, %" flag ", 0;\n\t"                                                       \
  "wgmma.mma_async.sync.aligned." shape ".f32.bf16.bf16 " operands ", p, " modes ";\n\t" \
  "}"

template <>
__device__ __forceinline__ void wgmma_ss<64>(float (&d)[32], u64 a, u64 b, bool accumulate) {
  asm volatile(SKIM_WGMMA("m64n64k16", "{" SKIM_R32 "}, %32, %33", "34", "1, 1, 0, 0")
               : SKIM_D32(0)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))
               : "memory");
}

template <>
__device__ __forceinline__ void wgmma_ss<128>(float (&d)[64], u64 a, u64 b, bool accumulate) {
  asm volatile(SKIM_WGMMA("m64n128k16", "{" SKIM_R64 "}, %64, %65", "66", "1, 1, 0, 0")
               : SKIM_D64(0)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))
               : "memory");
}

template <>
__device__ __forceinline__ void wgmma_rs<64>(float (&d)[32], const u32 (&a)[4], u64 b,
                                             bool accumulate) {
  asm volatile(
      SKIM_WGMMA("m64n64k16", "{" SKIM_R32 "}, {%32, %33, %34, %35}, %36", "37", "1, 1, 1")
      : SKIM_D32(0)
      : SKIM_A4, "l"(b), "r"(static_cast<int>(accumulate))
      : "memory");
}

template <>
__device__ __forceinline__ void wgmma_rs<128>(float (&d)[64], const u32 (&a)[4], u64 b,
                                              bool accumulate) {
  asm volatile(
      SKIM_WGMMA("m64n128k16", "{" SKIM_R64 "}, {%64, %65, %66, %67}, %68", "69", "1, 1, 1")
      : SKIM_D64(0)
      : SKIM_A4, "l"(b), "r"(static_cast<int>(accumulate))
      : "memory");
}

template <>
__device__ __forceinline__ void wgmma_rs<256>(float (&d)[128], const u32 (&a)[4], u64 b,
                                              bool accumulate) {
  asm volatile(
      SKIM_WGMMA("m64n256k16", "{" SKIM_R128 "}, {%128, %129, %130, %131}, %132", "133", "1, 1, 1")
      : SKIM_D64(0), SKIM_D64(64)
      : SKIM_A4, "l"(b), "r"(static_cast<int>(accumulate))
      : "memory");
}

#undef SKIM_WGMMA
#undef SKIM_R32
#undef SKIM_R64
#undef SKIM_R128
#undef SKIM_A4
#undef SKIM_D64
#undef SKIM_D32
#undef SKIM_D16
#undef SKIM_D4

#endif
