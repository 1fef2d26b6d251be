// mbarrier and the copy engine (TMA), two-dimensional bf16 tiles with the 128-byte swizzle.
//
// An mbarrier is the 8 bytes in shared memory, so that an overwritten or uninitialised one shows. A
// copy lands only when no thread can go on without it, the oldest first (the newest in reverse
// order): whoever does not wait for it reads 0xff.
#include <vector>

#include "scheduler.h"

namespace emu {
namespace {

constexpr uint64_t SIGN = 0x5u;  // high bits of an initialised barrier: poison is not one
constexpr unsigned MOST_ARRIVALS = (1u << 18) - 1, TILE_COLUMNS = 64, ROW_BYTES = 128;

struct Barrier {
  uint64_t sign : 4, phase : 1, arrivals : 18, pending : 18;
  int64_t bytes : 23;  // still to come
};
static_assert(sizeof(Barrier) == 8, "an mbarrier is 8 bytes");

struct Map {  // as device.py fills it in
  uint64_t magic, address, rows, columns, row_stride_bytes;
  uint32_t box_rows, box_columns;
};
constexpr uint64_t MAP_MAGIC = 0x70616D52534E4554ull;

struct Copy {
  unsigned shared, barrier;
  Map map;
  int x, y;
};
std::vector<Copy> under_way;

Barrier load(unsigned shared, const char* what) {
  Barrier barrier;
  memcpy(&barrier, shared_pointer(shared, 8, 8, what), 8);
  if (barrier.sign != SIGN)
    fail("%s: shared address 0x%x holds no initialised mbarrier", what, shared);
  return barrier;
}

// Store it; a phase whose arrivals and bytes are all there is over. Gives a thread that it wakes.
Thread* store(unsigned shared, Barrier barrier) {
  const bool over = barrier.pending == 0 && barrier.bytes == 0;
  if (over) {
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
  }
  memcpy(shared_pointer(shared, 8, 8, "mbarrier"), &barrier, 8);
  Thread* woken = nullptr;
  for (unsigned i = 0; over && i < threads_in_block(); i++)
    if (threads[i].state == AT_TRANSACTION && threads[i].barrier == shared) {
      wake(threads[i]);
      if (!woken) woken = &threads[i];
    }
  return woken;
}

}  // namespace

void reset_tensor_copies() { under_way.clear(); }

void check_tensor_copies_done() {
  if (under_way.empty()) return;
  fail("the block ends with %zu tensor copies under way, the first to shared address 0x%x",
       under_way.size(), under_way[0].shared);
}

void describe_transaction(unsigned shared, char* text, size_t room) {
  Barrier barrier;
  memcpy(&barrier, shared_pointer(shared, 8, 8, "mbarrier"), 8);
  snprintf(text, room, "the mbarrier at 0x%x, which lacks %u of %u arrivals and %d bytes", shared,
           static_cast<unsigned>(barrier.pending), static_cast<unsigned>(barrier.arrivals),
           static_cast<int>(barrier.bytes));
}

void mbarrier_init(unsigned shared, unsigned arrivals) {
  if (arrivals < 1 || arrivals > MOST_ARRIVALS) fail("mbarrier.init: %u arrivals", arrivals);
  Barrier barrier = {};
  barrier.sign = SIGN;
  barrier.arrivals = barrier.pending = arrivals;
  memcpy(shared_pointer(shared, 8, 8, "mbarrier.init"), &barrier, 8);
}

void mbarrier_arrive(unsigned shared, unsigned expected_bytes) {
  Barrier barrier = load(shared, "mbarrier.arrive");
  if (barrier.pending == 0)
    fail("mbarrier.arrive: the mbarrier at 0x%x has all its %u arrivals", shared,
         static_cast<unsigned>(barrier.arrivals));
  barrier.bytes += expected_bytes;
  barrier.pending--;
  // Who waited goes on first: a buffer that is given away too early is overwritten at once.
  if (Thread* woken = store(shared, barrier)) yield_to(*woken);
}

void mbarrier_wait(unsigned shared, unsigned parity) {
  while (load(shared, "mbarrier.try_wait").phase == (parity & 1u)) {
    current->state = AT_TRANSACTION;
    current->name = "mbarrier.try_wait";
    current->barrier = shared;
    current->parity = parity;
    wait_here();
  }
}

void tensor_copy(unsigned shared, const void* given, int x, int y, unsigned barrier) {
  Map map;
  memcpy(&map, given, sizeof map);
  if (map.magic != MAP_MAGIC) fail("cp.async.bulk.tensor: the map is not a tensor map");
  if (map.box_columns != TILE_COLUMNS)
    fail("cp.async.bulk.tensor: a box of %u columns; only whole panels of 64 are emulated",
         map.box_columns);
  load(barrier, "cp.async.bulk.tensor");
  const size_t bytes = static_cast<size_t>(map.box_rows) * ROW_BYTES;
  memset(shared_pointer(shared, bytes, 128, "cp.async.bulk.tensor"), 0xff, bytes);
  under_way.push_back({shared, barrier, map, x, y});
}

bool land_tensor_copy() {
  if (under_way.empty()) return false;
  const Copy copy = runs_reversed() ? under_way.back() : under_way.front();
  if (runs_reversed())
    under_way.pop_back();
  else
    under_way.erase(under_way.begin());
  const Map& map = copy.map;
  for (unsigned i = 0; i < map.box_rows; i++) {
    uint16_t row[TILE_COLUMNS] = {};
    const int64_t y = static_cast<int64_t>(copy.y) + i;
    if (y >= 0 && y < static_cast<int64_t>(map.rows)) {
      const uint64_t begin = map.address + static_cast<uint64_t>(y) * map.row_stride_bytes;
      for (unsigned j = 0; j < TILE_COLUMNS; j++) {
        const int64_t x = static_cast<int64_t>(copy.x) + j;
        if (x < 0 || x >= static_cast<int64_t>(map.columns)) continue;
        const void* from = reinterpret_cast<const void*>(begin + 2 * static_cast<uint64_t>(x));
        check_global(from, 2, 2, "cp.async.bulk.tensor");
        memcpy(&row[j], from, 2);
      }
    }
    for (unsigned chunk = 0; chunk < 8; chunk++) {
      const unsigned straight = copy.shared + i * ROW_BYTES + chunk * 16;
      const unsigned address = straight ^ (straight >> 7 & 7u) << 4;
      memcpy(shared_pointer(address, 16, 16, "cp.async.bulk.tensor"), row + 8 * chunk, 16);
    }
  }
  Barrier barrier = load(copy.barrier, "cp.async.bulk.tensor");
  barrier.bytes -= static_cast<int64_t>(map.box_rows) * ROW_BYTES;
  store(copy.barrier, barrier);
  return true;
}

}  // namespace emu
