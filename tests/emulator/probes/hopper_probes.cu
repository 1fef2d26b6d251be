// One warpgroup a kernel: TMA tiles as they lie in shared memory, and warpgroup products.
#include "hopper.cuh"

#ifndef WIDTH
#define WIDTH 64
#endif
enum { NONE, NO_WAIT, NO_FENCE, EARLY_USE, EARLY_OVERWRITE, SWAPPED_OFFSETS, LATE_COUNT, IN_FLIGHT,
       NAMED_TOO_EARLY, ONE_WARP_LESS, UNALIGNED_TILE };

constexpr int PANEL_COLUMNS = 64, PANEL_ROW_BYTES = 128;
constexpr int SHARED_WIDTH = WIDTH < 128 ? WIDTH : 128;  // widest B that from_shared takes

// One box of 64 rows at (x, y), as bf16 [64, 64] in the order in which it lies in shared memory.
extern "C" __global__ void __launch_bounds__(128, 1)
    tile(const __grid_constant__ TMap map, bf16* out, int x, int y, int defect) {
  SKIM_SHARED(shared);
  __shared__ u64 barrier;
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&barrier, 64 * PANEL_ROW_BYTES - (defect == LATE_COUNT ? 16 : 0));
    tma_load_2d(shared + (defect == UNALIGNED_TILE ? 16 : 0), &map, x, y, &barrier);
  }
  if (defect != NO_WAIT) mbarrier_wait(&barrier, 0);
  for (int i = threadIdx.x; i < 64 * 64; i += 128) out[i] = reinterpret_cast<bf16*>(shared)[i];
}

// D [64, width] = A [64, 128] B [width, 128]^T from two panels each, in two groups.
extern "C" __global__ void __launch_bounds__(128, 1)
    from_shared(const __grid_constant__ TMap a_map, const __grid_constant__ TMap b_map,
                float* out, int defect) {
  SKIM_SHARED(shared);
  __shared__ u64 barrier;
  constexpr int A_PANEL = 64 * PANEL_ROW_BYTES, B_PANEL = SHARED_WIDTH * PANEL_ROW_BYTES;
  unsigned char* const b = shared + 2 * A_PANEL;
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&barrier, 2 * (A_PANEL + B_PANEL));
    for (int panel = 0; panel < 2; ++panel) {
      tma_load_2d(shared + panel * A_PANEL, &a_map, PANEL_COLUMNS * panel, 0, &barrier);
      tma_load_2d(b + panel * B_PANEL, &b_map, PANEL_COLUMNS * panel, 0, &barrier);
    }
  }
  mbarrier_wait(&barrier, 0);
  float d[SHARED_WIDTH / 2];
  for (int i = 0; i < SHARED_WIDTH / 2; ++i) d[i] = 1e30f;  // the first product replaces it
  if (defect != NO_FENCE) wgmma_fence();
  for (int step = 0; step < 8; ++step) {
    if (defect == ONE_WARP_LESS && warp_index() == 3 && step == 7) break;
    const int panel = step / 4, inside = step % 4 * 32;
    wgmma_ss<SHARED_WIDTH>(d, wgmma_descriptor(shared + panel * A_PANEL, 16, 1024) + (inside >> 4),
                    wgmma_descriptor(b + panel * B_PANEL, 16, 1024) + (inside >> 4), step > 0);
    if (step == 3) {
      wgmma_commit();
      wgmma_fence();
    }
  }
  wgmma_commit();
  if (defect == EARLY_OVERWRITE) {
    __syncthreads();
    reinterpret_cast<float*>(shared)[threadIdx.x] = 1e3f;
    __syncthreads();
  }
  if (defect == EARLY_USE) d[3] += 1.0f;
  if (defect == NAMED_TOO_EARLY) wgmma_wait<1>(d);
  if (defect != IN_FLIGHT) wgmma_wait<0>(d);
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  for (int i = 0; i < SHARED_WIDTH / 2; ++i)
    out[(row + i / 2 % 2 * 8) * SHARED_WIDTH + column + i / 4 * 8 + i % 2] = d[i];
}

// D [64, WIDTH] += A [64, 32] V [32, WIDTH]; A from registers in the layout of packed accumulators.
extern "C" __global__ void __launch_bounds__(128, 1)
    from_registers(const u32* a, const __grid_constant__ TMap v_map, float* out, int defect) {
  SKIM_SHARED(shared);
  __shared__ u64 barrier;
  constexpr int PANEL = 32 * PANEL_ROW_BYTES;
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(&barrier, WIDTH / PANEL_COLUMNS * PANEL);
    for (int panel = 0; panel < WIDTH / PANEL_COLUMNS; ++panel)
      tma_load_2d(shared + panel * PANEL, &v_map, PANEL_COLUMNS * panel, 0, &barrier);
  }
  mbarrier_wait(&barrier, 0);
  const int row = warp_index() * 16 + lane_index() / 4, column = lane_index() % 4 * 2;
  float d[WIDTH / 2];
  for (int i = 0; i < WIDTH / 2; ++i)
    d[i] = out[(row + i / 2 % 2 * 8) * WIDTH + column + i / 4 * 8 + i % 2];
  u32 own[2][4];  // row-major A as pairs: [64, 16]
  for (int step = 0; step < 2; ++step)
    for (int i = 0; i < 4; ++i)
      own[step][i] = a[(row + i % 2 * 8) * 16 + (step * 16 + column + i / 2 * 8) / 2];
  const u64 v = defect == SWAPPED_OFFSETS ? wgmma_descriptor(shared, 1024, PANEL)
                                          : wgmma_descriptor(shared, PANEL, 1024);
  wgmma_fence();
  for (int step = 0; step < 2; ++step)
    wgmma_rs<WIDTH>(d, own[step], v + ((step * 16 * PANEL_ROW_BYTES) >> 4), true);
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int i = 0; i < WIDTH / 2; ++i)
    out[(row + i / 2 % 2 * 8) * WIDTH + column + i / 4 * 8 + i % 2] = d[i];
}

// A warp that loads, three that add: ROUNDS tiles through a ring of two, handed over by mbarriers.
extern "C" __global__ void __launch_bounds__(128, 1)
    ring(const __grid_constant__ TMap map, float* out, int rounds, int defect) {
  SKIM_SHARED(shared);
  __shared__ u64 full[2], empty[2];
  constexpr int TILE = 8 * PANEL_ROW_BYTES;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < 2; ++slot) {
      mbarrier_init(&full[slot], 1);
      mbarrier_init(&empty[slot], defect == LATE_COUNT ? 4 : 3);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp_index() == 0) {
    registers_release<24>();
    for (int round = 0; round < rounds; ++round) {
      const int slot = round % 2;
      mbarrier_wait(&empty[slot], (round / 2 & 1) ^ 1);
      if (elect_one()) {
        mbarrier_arrive_expect(&full[slot], TILE);
        tma_load_2d(shared + slot * TILE, &map, 0, 8 * round, &full[slot]);
      }
      __syncwarp();
    }
    return;
  }
  registers_claim<240>();
  float sum = 0.0f;
  for (int round = 0; round < rounds; ++round) {
    const int slot = round % 2;
    mbarrier_wait(&full[slot], round / 2 & 1);
    if (defect == EARLY_OVERWRITE && lane_index() == 0) mbarrier_arrive(&empty[slot]);
    const bf16* const tile = reinterpret_cast<const bf16*>(shared + slot * TILE);
    for (int i = lane_index(); i < TILE / 2; i += WARP) sum += bf16_to_float(tile[i]);
    __syncwarp();
    if (defect != EARLY_OVERWRITE && lane_index() == 0) mbarrier_arrive(&empty[slot]);
  }
  out[threadIdx.x - WARP] = warp_sum(sum);
}
