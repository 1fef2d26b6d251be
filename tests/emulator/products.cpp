// Matrix products: mma.sync's at once, wgmma's when they are waited for.
//
// A wgmma reads shared memory by the bits of its descriptors, at the wait, and its accumulators are
// NaN in between: a wrong descriptor, an overwritten buffer or an early use gives wrong numbers.
// The sums are fp32 with k ascending, the same on every machine.
#include <vector>

#include "scheduler.h"

namespace emu {

#ifdef __x86_64__
#define SKIM_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define SKIM_CLONES
#endif

namespace {

typedef float Eight __attribute__((vector_size(32)));

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// C[16, n] += A[16, 16] B[16, n]; n is a multiple of 8.
SKIM_CLONES
void multiply(float* c, const float a[16][16], const float* b, int n) {
  for (int begin = 0; begin < n; begin += 8)
    for (int i = 0; i < 16; i++) {
      Eight row, column;
      memcpy(&row, c + i * n + begin, sizeof row);
      for (int k = 0; k < 16; k++) {
        memcpy(&column, b + k * n + begin, sizeof column);
        row += a[i][k] * column;
      }
      memcpy(c + i * n + begin, &row, sizeof row);
    }
}

struct Fragments {  // what a lane passes to mma.sync
  float* c;
  const unsigned* a;
  unsigned b[2];
};

void spread(unsigned pair, float* first, float* second) {
  *first = widen(static_cast<uint16_t>(pair));
  *second = widen(static_cast<uint16_t>(pair >> 16));
}

void run_multiply_accumulate(void** lanes, unsigned) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const auto& own = *static_cast<Fragments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      float* at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      spread(own.a[i], at, at + 1);
      c[g + i / 2 * 8][2 * t + i % 2] = own.c[i];
    }
    for (int i = 0; i < 2; i++) spread(own.b[i], &b[2 * t + 8 * i][g], &b[2 * t + 8 * i + 1][g]);
  }
  multiply(c[0], a, b[0], 8);
  for (int lane = 0; lane < 32; lane++) {
    float* own = static_cast<Fragments*>(lanes[lane])->c;
    for (int i = 0; i < 4; i++) own[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

struct Rows {  // what a lane passes to ldmatrix
  unsigned address;
  unsigned* registers;
};

template <bool TRANSPOSED>
void run_load_matrices(void** lanes, unsigned) {
  uint16_t matrix[8][8];
  for (int i = 0; i < 4; i++) {
    for (int row = 0; row < 8; row++) {
      const unsigned address = static_cast<Rows*>(lanes[8 * i + row])->address;
      memcpy(matrix[row], shared_pointer(address, 16, 16, "ldmatrix"), 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      const unsigned low = TRANSPOSED ? matrix[2 * t][g] : matrix[g][2 * t];
      const unsigned high = TRANSPOSED ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<Rows*>(lanes[lane])->registers[i] = high << 16 | low;
    }
  }
}

}  // namespace

void load_matrices(unsigned (&registers)[4], unsigned shared_row, bool transposed) {
  static const Operation straight = {"ldmatrix.x4", run_load_matrices<false>};
  static const Operation across = {"ldmatrix.x4.trans", run_load_matrices<true>};
  Rows rows = {shared_row, registers};
  collective(transposed ? across : straight, &rows);
}

void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  static const Operation operation = {"mma.m16n8k16", run_multiply_accumulate};
  Fragments fragments = {c, a, {b0, b1}};
  collective(operation, &fragments);
}

namespace {

// In accumulators under way: a signalling NaN, so that arithmetic on it leaves other bits.
constexpr uint32_t UNDER_WAY = 0xffb5a5a5u;

struct Issue {  // what a lane passes to the collective
  float* d;
  int columns;
  const unsigned* a_registers;
  uint64_t a, b;
  bool accumulate;
};

struct Product {
  size_t accumulator;  // index into Warp::accumulators
  bool from_registers, accumulate;
  float a[16][16];  // if from registers
  uint64_t a_descriptor, b_descriptor;
  unsigned group;
};

struct Accumulator {
  float* lanes[32];
  int columns;
  unsigned last_group, waiting;  // products still under way
  std::vector<float> values;     // [16, columns]
};

struct Warp {
  std::vector<Product> products;
  std::vector<Accumulator> accumulators;
  unsigned open_group, issued;
  bool fenced;
};
std::vector<Warp> warps;

// Element 4 j + 2 h + e of a lane is row lane / 4 + 8 h, column 8 j + 2 (lane % 4) + e.
size_t place_of(int lane, int element, int columns) {
  const int row = lane / 4 + element / 2 % 2 * 8;
  return static_cast<size_t>(row) * columns + element / 4 * 8 + lane % 4 * 2 + element % 2;
}

struct Descriptor {
  unsigned start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    const auto shown = static_cast<unsigned long long>(bits);
    if (bits >> 62 != 1) fail("wgmma: descriptor 0x%llx has no 128-byte swizzle", shown);
    if (bits >> 49 & 7 || start & 0x380)
      fail("wgmma: descriptor 0x%llx starts inside a pattern of 1,024 bytes", shown);
  }
  const uint16_t* at(unsigned offset, size_t bytes) const {
    const unsigned straight = start + offset, address = straight ^ (straight >> 7 & 7u) << 4;
    return reinterpret_cast<const uint16_t*>(shared_pointer(address, bytes, bytes, "wgmma"));
  }
};

// X[row][k], k contiguous, as [16, rows] or [rows, 16] floats.
void read_k_major(const Descriptor& from, int first_row, int rows, float* target, int row_step,
                  int k_step) {
  for (int r = 0; r < rows; r++) {
    const unsigned row = first_row + r;
    for (int half = 0; half < 2; half++) {
      const uint16_t* values = from.at(row / 8 * from.stride + row % 8 * 128 + half * 16, 16);
      for (int k = 0; k < 8; k++) target[r * row_step + (8 * half + k) * k_step] = widen(values[k]);
    }
  }
}

// X[k][n], n contiguous, as [16, columns] floats.
void read_mn_major(const Descriptor& from, int columns, float* target) {
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < columns; n += 8) {
      const unsigned row = k / 8 * from.stride + k % 8 * 128;
      const unsigned offset = n / 64 * from.leading + n % 64 * 2 + row;
      const uint16_t* values = from.at(offset, 16);
      for (int i = 0; i < 8; i++) target[k * columns + n + i] = widen(values[i]);
    }
}

void land(Warp& warp, unsigned warp_in_group, Product& product) {
  Accumulator& accumulator = warp.accumulators[product.accumulator];
  const int columns = accumulator.columns;
  static float b[16 * 256];
  if (product.from_registers) {
    read_mn_major(Descriptor(product.b_descriptor), columns, b);
  } else {
    read_k_major(Descriptor(product.a_descriptor), 16 * warp_in_group, 16, product.a[0], 16, 1);
    read_k_major(Descriptor(product.b_descriptor), 0, columns, b, 1, columns);
  }
  if (!product.accumulate) accumulator.values.assign(accumulator.values.size(), 0.0f);
  multiply(accumulator.values.data(), product.a, b, columns);
  accumulator.waiting--;
}

void run_issue(void** lanes, unsigned) {
  const auto& first = *static_cast<Issue*>(lanes[0]);
  Warp& warp = warps[current->warp];
  if (!warp.fenced) fail("wgmma.mma_async without a wgmma.fence since the last group");
  for (int lane = 0; lane < 32; lane++) {
    const auto& issue = *static_cast<Issue*>(lanes[lane]);
    if (issue.a != first.a || issue.b != first.b || issue.accumulate != first.accumulate ||
        issue.columns != first.columns || !issue.a_registers != !first.a_registers)
      fail("wgmma.mma_async: lane %d differs from lane 0 in descriptor, shape or scale", lane);
  }
  size_t found = 0;
  while (found < warp.accumulators.size() && warp.accumulators[found].lanes[0] != first.d) found++;
  if (found == warp.accumulators.size()) {
    Accumulator fresh = {};
    fresh.columns = first.columns;
    fresh.values.resize(16 * static_cast<size_t>(first.columns));
    for (int lane = 0; lane < 32; lane++) {
      float* d = fresh.lanes[lane] = static_cast<Issue*>(lanes[lane])->d;
      for (int i = 0; i < first.columns / 2; i++)
        fresh.values[place_of(lane, i, first.columns)] = d[i];
      for (int i = 0; i < first.columns / 2; i++) memcpy(d + i, &UNDER_WAY, 4);
    }
    warp.accumulators.push_back(static_cast<Accumulator&&>(fresh));
  }
  Accumulator& accumulator = warp.accumulators[found];
  if (accumulator.columns != first.columns)
    fail("wgmma.mma_async: the same accumulators with another shape under way");
  accumulator.waiting++;
  Product product = {};
  product.accumulator = found;
  product.from_registers = first.a_registers;
  product.accumulate = first.accumulate;
  product.a_descriptor = first.a;
  product.b_descriptor = first.b;
  product.group = warp.open_group;
  if (first.a_registers)
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        float* at = &product.a[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
        spread(static_cast<Issue*>(lanes[lane])->a_registers[i], at, at + 1);
      }
  warp.products.push_back(product);
  warp.issued++;
}

// Give values back to the lanes whose products have all landed, and forget them.
void return_accumulators(Warp& warp) {
  for (Accumulator& accumulator : warp.accumulators) {
    if (accumulator.waiting || !accumulator.columns) continue;
    for (int lane = 0; lane < 32; lane++) {
      float* d = accumulator.lanes[lane];
      for (int i = 0; i < accumulator.columns / 2; i++) {
        uint32_t bits;
        memcpy(&bits, d + i, 4);
        if (bits != UNDER_WAY)
          fail("lane %d wrote its accumulator %d while a wgmma was under way", lane, i);
        d[i] = accumulator.values[place_of(lane, i, accumulator.columns)];
      }
    }
    accumulator.columns = 0;
    accumulator.lanes[0] = nullptr;
  }
  if (warp.products.empty()) warp.accumulators.clear();
}

void run_wait(void** lanes, unsigned) {
  const unsigned pending = *static_cast<unsigned*>(lanes[0]);
  Warp& warp = warps[current->warp];
  size_t landed = 0;
  while (landed < warp.products.size() && warp.products[landed].group + pending < warp.open_group)
    land(warp, current->warp % 4, warp.products[landed++]);
  warp.products.erase(warp.products.begin(), warp.products.begin() + static_cast<long>(landed));
  return_accumulators(warp);
}

}  // namespace

void reset_products() {
  warps.resize(32);
  for (Warp& warp : warps) {
    warp.products.clear();
    warp.accumulators.clear();
    warp.open_group = warp.issued = 0;
    warp.fenced = false;
  }
}

void check_products_done() {
  for (unsigned i = 0; i < 32; i++) {
    if (!warps[i].products.empty()) fail("warp %u ends with a wgmma under way", i);
    if (warps[i].issued != warps[i / 4 * 4].issued)
      fail("the warpgroup has diverged: warp %u issued %u wgmma, warp %u %u", i / 4 * 4,
           warps[i / 4 * 4].issued, i, warps[i].issued);
  }
}

void wgmma_fence() {
  static const Operation operation = {"wgmma.fence", [](void**, unsigned) {
                                        warps[current->warp].fenced = true;
                                      }};
  collective(operation, nullptr);
}

void wgmma_issue(float* d, int columns, const unsigned* a_registers, uint64_t a, uint64_t b,
                 bool accumulate) {
  static const Operation operation = {"wgmma.mma_async", run_issue};
  Issue issue = {d, columns, a_registers, a, b, accumulate};
  collective(operation, &issue);
}

void wgmma_commit() {
  static const Operation operation = {"wgmma.commit_group", [](void**, unsigned) {
                                        warps[current->warp].open_group++;
                                        warps[current->warp].fenced = false;
                                      }};
  collective(operation, nullptr);
}

void wgmma_wait(unsigned pending) {
  static const Operation operation = {"wgmma.wait_group", run_wait};
  collective(operation, &pending);
}

void wgmma_check_ready(const float* d) {
  for (const Accumulator& accumulator : warps[current->warp].accumulators)
    if (accumulator.columns && accumulator.lanes[current->lane] == d)
      fail("wgmma.wait_group: an accumulator it names is still under way");
}

}  // namespace emu
