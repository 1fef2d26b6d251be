// Shared memory, barriers and rings of attention_sm90.cu: what its loading and computing warps share.
//
// Defines: HEAD_DIM, KEY_TILE, STAGES, QUERY_SLOTS, PING_PONG, PERSISTENT; attention_sm90.cu says what
// they mean, kernels/ops/attention_sm90.py which values go together.
#pragma once

#include "common.cuh"
#include "hopper.cuh"

constexpr int DIM = HEAD_DIM;
constexpr int KEYS = KEY_TILE;
constexpr int KEY_TILES = BLOCK_TOKENS / KEYS;  // steps a block
constexpr int GROUP_THREADS = 128;
constexpr int GROUPS = 2;       // computing warpgroups
constexpr int GROUP_ROWS = 64;  // query rows of each: the m of wgmma
constexpr int COMPUTING_WARPS = GROUPS * GROUP_THREADS / WARP;
constexpr int PANEL = 64;         // columns of a swizzled panel
constexpr int PANEL_STRIDE = 128; // bytes of its rows
constexpr int QUERY_BYTES = BLOCK_TOKENS * DIM * 2;
constexpr int TILE_BYTES = KEYS * DIM * 2;
constexpr int K_STEP = 16;  // of wgmma

// Registers a thread: 128 * 40 + 256 * 232 are the 504 * 128 that the launch bound grants.
constexpr int LOADING_REGISTERS = 40;
constexpr int COMPUTING_REGISTERS = 232;

// Shared memory, in bytes from its start. Tiles come first: the swizzle wants 1,024-byte alignment.
constexpr int KEYS_AT = QUERY_SLOTS * QUERY_BYTES;
constexpr int VALUES_AT = KEYS_AT + STAGES * TILE_BYTES;
constexpr int ITEMS_AT = VALUES_AT + STAGES * TILE_BYTES;
constexpr int BARRIERS_AT = ITEMS_AT + QUERY_SLOTS * 16;
constexpr int FIXED_BYTES = BARRIERS_AT + 256;
static_assert(3 * QUERY_SLOTS + 4 * STAGES <= 32, "barriers outgrow their 256 bytes");

constexpr int FIRST_TURN = 1;  // named barrier of computing group 0; the next one is group 1's

struct alignas(16) Item {
  int head, tile, count, mean_tiles;  // tile < 0: no more items
};

struct Problem {
  const int* indices;
  const int* counts;
  int* next_item;
  int num_tokens, num_tiles, num_heads, num_kv_heads, full_tiles;
  bool corrected;
  float scale_log2;  // scale * log2(e): weights are exp2(scale_log2 * score)
};

struct Shared {
  unsigned char* base;
  int offsets_length;

  __device__ unsigned char* queries(int slot) const { return base + slot * QUERY_BYTES; }
  __device__ unsigned char* keys(int stage) const { return base + KEYS_AT + stage * TILE_BYTES; }
  __device__ unsigned char* values(int stage) const { return base + VALUES_AT + stage * TILE_BYTES; }
  __device__ Item* item(int slot) const { return reinterpret_cast<Item*>(base + ITEMS_AT) + slot; }
  // What a mean's score gets: log2(128) / scale_log2 for a pruned block, -inf for any other.
  __device__ float* offsets(int slot) const {
    return reinterpret_cast<float*>(base + FIXED_BYTES) + slot * offsets_length;
  }
  __device__ u64* barrier(int index) const {
    return reinterpret_cast<u64*>(base + BARRIERS_AT) + index;
  }
  __device__ u64* item_full(int slot) const { return barrier(slot); }
  __device__ u64* item_empty(int slot) const { return barrier(QUERY_SLOTS + slot); }
  __device__ u64* offsets_full(int slot) const { return barrier(2 * QUERY_SLOTS + slot); }
  __device__ u64* keys_full(int stage) const { return barrier(3 * QUERY_SLOTS + stage); }
  __device__ u64* keys_empty(int stage) const { return barrier(3 * QUERY_SLOTS + STAGES + stage); }
  __device__ u64* values_full(int stage) const {
    return barrier(3 * QUERY_SLOTS + 2 * STAGES + stage);
  }
  __device__ u64* values_empty(int stage) const {
    return barrier(3 * QUERY_SLOTS + 3 * STAGES + stage);
  }
};

// A place in a ring of buffers and the parity of its present round. Who fills waits for `parity ^ 1` of
// "empty" (on a fresh barrier that wait passes), who uses waits for `parity` of "full".
template <int SIZE>
struct Ring {
  int at = 0;
  u32 parity = 0;

  __device__ void advance() {
    if (++at == SIZE) {
      at = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ void init_barriers(const Shared& shared) {
  for (int slot = 0; slot < QUERY_SLOTS; ++slot) {
    mbarrier_init(shared.item_full(slot), 1);
    // Items and offsets are ordinary loads and stores of whole warps: each lane arrives for its own.
    mbarrier_init(shared.item_empty(slot), COMPUTING_WARPS * WARP);
    mbarrier_init(shared.offsets_full(slot), WARP);
  }
  for (int stage = 0; stage < STAGES; ++stage) {
    mbarrier_init(shared.keys_full(stage), 1);
    mbarrier_init(shared.keys_empty(stage), COMPUTING_WARPS);
    mbarrier_init(shared.values_full(stage), 1);
    mbarrier_init(shared.values_empty(stage), COMPUTING_WARPS);
  }
  mbarrier_init_fence();
}
