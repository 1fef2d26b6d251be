// Which blocks of keys each tile of queries reads: a threshold, forced blocks, a bound.
//
// For each row (query head, tile I) of masses, visible blocks J <= I:
//   the last `last_full` tiles keep every visible block
//   forced      the first `sink` and the last `window` visible blocks
//   candidates  not forced, mass >= alpha * largest visible mass (a float32 product)
//   bound       max(8, ceil(max_density (I + 1) - 1e-9)), in double, rounded after each step
//   kept        forced, and the bound - |forced| candidates of largest mass (ties: the lower index)
// The row is *cut* when a candidate was left out. Lists equal `select_row` exactly, given the mass.
//
// Shapes:  mass     float32 [heads, num_blocks (tiles), num_blocks], >= 0; J > I is not read
//          indices  int32 [heads, num_blocks, num_blocks]: `count` blocks, ascending; the rest of
//                   a row is not written
//          counts   int32 [heads, num_blocks]
//          cut      uint8 [heads, num_blocks]
// Grid:    ceil(heads * num_blocks / 4), 128 threads: a warp a row.
// Shared:  16 * num_blocks bytes: per warp a word for each block of its row.
// Limits:  num_blocks <= 6,336 (the 99 KiB of sm_89); no NaN; alpha >= 0.
// Source:  FlashPrefill (arXiv:2603.06199); the bound is our own.
// Reference: kernels/reference/block_select.py.
// Measured (H100, a layer of Qwen3-0.6B at 131,072 tokens): 0.139 ms.
//
// Non-negative floats are ordered like their bits, so the smallest mass that stays is found bit by
// bit from the top: 31 counts at most, over words in shared memory, and only for rows that are cut.
// A lane reads only the words that it wrote itself: every 32nd.

#include "common.cuh"

constexpr int WARPS = 4;
constexpr int MIN_BOUND_BLOCKS = 8;  // below, a bound would cut into what is forced by default
constexpr u32 FORCED = 0xffffffffu;  // above every candidate's word; 0 is below

__device__ __forceinline__ int warp_count(int value) {
  return static_cast<int>(__reduce_add_sync(FULL_WARP, static_cast<u32>(value)));
}

// How many of words [0, visible) lie in [from, to).
__device__ __forceinline__ int count_between(const u32* words, int visible, u32 from, u32 to) {
  int count = 0;
  for (int block = lane_index(); block < visible; block += WARP)
    count += words[block] >= from && words[block] < to;
  return warp_count(count);
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP)
block_select(const float* mass, int* indices, int* counts, u8* cut, int num_rows, int num_blocks,
             int sink, int window, int last_full, float alpha, i64 max_density_bits) {
  SKIM_SHARED(shared);
  const int warp = warp_index(), lane = lane_index();
  const int row = blockIdx.x * WARPS + warp;
  if (row >= num_rows) return;
  u32* words = reinterpret_cast<u32*>(shared) + warp * num_blocks;
  const int tile = row % num_blocks, visible = tile + 1;
  mass += static_cast<i64>(row) * num_blocks;
  indices += static_cast<i64>(row) * num_blocks;

  if (tile >= num_blocks - last_full) {
    for (int block = lane; block < visible; block += WARP) indices[block] = block;
    if (lane == 0) {
      counts[row] = visible;
      cut[row] = 0;
    }
    return;
  }

  float largest = 0.0f;
  for (int block = lane; block < visible; block += WARP) {
    const float value = mass[block];
    words[block] = __float_as_uint(value);
    largest = fmaxf(largest, value);
  }
  largest = warp_max(largest);

  // Words become: 0 for what is dropped, bits + 1 for a candidate, FORCED.
  const float threshold = alpha * largest;
  int forced = 0, candidates = 0;
  for (int block = lane; block < visible; block += WARP) {
    const bool is_forced = block < sink || block >= visible - window;
    const bool is_candidate = !is_forced && __uint_as_float(words[block]) >= threshold;
    words[block] = is_forced ? FORCED : is_candidate ? words[block] + 1 : 0;
    forced += is_forced;
    candidates += is_candidate;
  }
  forced = warp_count(forced);
  candidates = warp_count(candidates);

  // By name, since a multiplication fused with the subtraction would round once only.
  const double share = __dmul_rn(__longlong_as_double(max_density_bits), visible);
  const int bound = max(MIN_BOUND_BLOCKS, static_cast<int>(ceil(__dadd_rn(share, -1e-9))));
  const int room = max(0, bound - forced);
  const bool is_cut = candidates > room;

  // The smallest word that stays, and how many of exactly this word do.
  u32 smallest = 1;
  int ties = visible;
  if (is_cut) {
    smallest = 0;
    for (u32 bit = 1u << 30; bit > 0; bit >>= 1) {
      const int above = count_between(words, visible, smallest | bit, FORCED);
      if (above >= room) smallest |= bit;
      if (above == room) break;
    }
    ties = room - count_between(words, visible, smallest + 1, FORCED);
  }

  int kept = 0;
  const u32 lanes_below = (1u << lane) - 1;
  for (int begin = 0; begin < visible; begin += WARP) {
    const int block = begin + lane;
    const u32 word = block < visible ? words[block] : 0;
    const u32 tied = __ballot_sync(FULL_WARP, word == smallest);
    const bool keep = word > smallest || (word == smallest && __popc(tied & lanes_below) < ties);
    ties -= min(ties, __popc(tied));
    const u32 keeping = __ballot_sync(FULL_WARP, keep);
    if (keep) indices[kept + __popc(keeping & lanes_below)] = block;
    kept += __popc(keeping);
  }
  if (lane == 0) {
    counts[row] = kept;
    cut[row] = is_cut;
  }
}
