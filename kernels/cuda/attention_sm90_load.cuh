// The loading warp of attention_sm90.cu: item after item, it asks the copy engine for queries, keys and
// values in the order in which they are used, and marks which block means stand in for their block.
#pragma once

#include "attention_sm90.cuh"

// Where K and V of one kind of tile lie: a map and the first column of the head in it.
struct Source {
  const TMap* map;
  int column;
};

// One warp fills the rings. V of a tile is asked for after K of the next: they are used in that order.
struct Loader {
  Shared shared;
  int lane;
  Ring<STAGES> ring;
  bool pending = false;  // a V tile still to be asked for: this one
  Source value{};
  int value_row = 0;
  Ring<STAGES> value_ring;

  __device__ void tile(const Source& keys, const Source& values, int row) {
    mbarrier_wait(shared.keys_empty(ring.at), ring.parity ^ 1);
    if (lane == 0) load(shared.keys(ring.at), shared.keys_full(ring.at), keys, row);
    flush();
    pending = true;
    value = values;
    value_row = row;
    ring.advance();
  }

  __device__ void flush() {
    if (!pending) return;
    const int at = value_ring.at;
    mbarrier_wait(shared.values_empty(at), value_ring.parity ^ 1);
    if (lane == 0) load(shared.values(at), shared.values_full(at), value, value_row);
    value_ring.advance();
    pending = false;
  }

  __device__ static void load(unsigned char* tile, u64* full, const Source& source, int row) {
    mbarrier_arrive_expect(full, TILE_BYTES);
#pragma unroll
    for (int panel = 0; panel < DIM / PANEL; ++panel)
      tma_load_2d(tile + panel * KEYS * PANEL_STRIDE, source.map, source.column + panel * PANEL,
                  row, full);
  }
};

// An item with its first listed blocks, one a lane, read ahead.
struct Row {
  int head, tile, count, block;
};

__device__ __forceinline__ int num_items(const Problem& problem) {
  return problem.num_heads * problem.num_tiles;
}

__device__ __forceinline__ const int* list_of(const Problem& problem, int head, int tile) {
  return problem.indices + (static_cast<i64>(head) * problem.num_tiles + tile) * problem.num_tiles;
}

// The block at a place of the list. Places from the count up to the tile hold anything: not used.
__device__ __forceinline__ int block_at(const Problem& problem, const Row& row, int place) {
  if (problem.indices == nullptr) return place;
  return place <= row.tile ? list_of(problem, row.head, row.tile)[place] : 0;
}

// Items by falling cost: the full tiles of all heads, then KV head by KV head, whose K and V then stay
// in L2, the last tile first.
__device__ __forceinline__ Row row_of(const Problem& problem, int item, int lane) {
  Row row{0, -1, 0, 0};
  if (item >= num_items(problem)) return row;
  const int full = problem.num_heads * problem.full_tiles;
  if (item < full) {
    row.tile = problem.num_tiles - 1 - item / problem.num_heads;
    row.head = item % problem.num_heads;
  } else {
    const int group = problem.num_heads / problem.num_kv_heads;
    const int each = group * (problem.num_tiles - problem.full_tiles);
    const int kv_head = (item - full) / each, rest = (item - full) % each;
    row.tile = problem.num_tiles - 1 - problem.full_tiles - rest / group;
    row.head = kv_head * group + rest % group;
  }
  row.count = problem.indices == nullptr ? row.tile + 1
                                         : problem.counts[row.head * problem.num_tiles + row.tile];
  row.block = block_at(problem, row, lane);
  return row;
}

// Every block before the tile is taken for pruned, until the list says otherwise.
__device__ __forceinline__ void fill_offsets(const Problem& problem, int tile, float* offsets,
                                             int length, int lane) {
  const float stand_in = LOG2_BLOCK_TOKENS / problem.scale_log2;
  for (int block = lane; block < length; block += WARP)
    offsets[block] = block < tile ? stand_in : negative_infinity();
  __syncwarp();
}

// The maps and their present columns: what one item reads.
struct Sources {
  const TMap* query;
  Source k, v, k_mean, v_mean;
};

// Announce an item, ask for its queries and its diagonal block.
__device__ __forceinline__ void load_diagonal(Loader& loader, const Row& row, int mean_tiles,
                                              int slot, const Sources& from) {
  if (loader.lane == 0) {
    *loader.shared.item(slot) = Item{row.head, row.tile, row.count, mean_tiles};
    u64* const full = loader.shared.item_full(slot);
    mbarrier_arrive_expect(full, QUERY_BYTES);
#pragma unroll
    for (int panel = 0; panel < DIM / PANEL; ++panel)
      tma_load_2d(loader.shared.queries(slot) + panel * BLOCK_TOKENS * PANEL_STRIDE, from.query,
                  row.head * DIM + panel * PANEL, row.tile * BLOCK_TOKENS, full);
  }
#pragma unroll
  for (int part = 0; part < KEY_TILES; ++part)
    loader.tile(from.k, from.v, row.tile * BLOCK_TOKENS + part * KEYS);
}

// `offsets`: of the means, null if none are read.
__device__ __forceinline__ void load_listed(const Problem& problem, Loader& loader, const Row& row,
                                            const Sources& from, float* offsets) {
  int blocks = 0, coming = row.block;
  for (int place = 0; place < row.count - 1; ++place) {
    if (place % WARP == 0) {
      blocks = coming;
      coming = block_at(problem, row, place + WARP + loader.lane);
      if (offsets != nullptr && place + loader.lane < row.count - 1)
        offsets[blocks] = negative_infinity();
    }
    const int block = __shfl_sync(FULL_WARP, blocks, place % WARP);
#pragma unroll
    for (int part = 0; part < KEY_TILES; ++part)
      loader.tile(from.k, from.v, block * BLOCK_TOKENS + part * KEYS);
  }
}

__device__ __forceinline__ void load_items(const Problem& problem, const Shared& shared,
                                           Sources from) {
  Loader loader{shared, lane_index()};
  Ring<QUERY_SLOTS> slots;
  const int group = problem.num_heads / problem.num_kv_heads;
  Row row = row_of(problem, static_cast<int>(blockIdx.x), loader.lane);
  for (;;) {
    mbarrier_wait(shared.item_empty(slots.at), slots.parity ^ 1);
    if (row.tile < 0) break;
    // The next item and its list are asked for early: nobody then waits for these trips to memory.
    int item = num_items(problem);
    if (PERSISTENT && loader.lane == 0)
      item = static_cast<int>(gridDim.x) + atomicAdd(problem.next_item, 1);
    const bool pruned = problem.corrected && row.count <= row.tile;
    const int mean_tiles = pruned ? ceil_div(row.tile, KEYS) : 0;
    const int kv_head = row.head / group;
    from.k.column = from.v.column = kv_head * DIM;
    load_diagonal(loader, row, mean_tiles, slots.at, from);
    const Row next = row_of(problem, __shfl_sync(FULL_WARP, item, 0), loader.lane);
    float* const offsets = mean_tiles > 0 ? shared.offsets(slots.at) : nullptr;
    if (mean_tiles > 0)
      fill_offsets(problem, row.tile, offsets, mean_tiles * KEYS, loader.lane);
    load_listed(problem, loader, row, from, offsets);
    mbarrier_arrive(shared.offsets_full(slots.at));
    // The last box may run into the next head's means; their offsets are -inf.
    for (int part = 0; part < mean_tiles; ++part)
      loader.tile(from.k_mean, from.v_mean, kv_head * problem.num_tiles + part * KEYS);
    row = next;
    slots.advance();
  }
  if (loader.lane == 0) {
    shared.item(slots.at)->tile = -1;
    mbarrier_arrive(shared.item_full(slots.at));
  }
  loader.flush();
}
