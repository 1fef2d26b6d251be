// What the emulated kernels and the runtime know of each other.
//
// A kernel's source is compiled as C++ with this header and cuda.h included first; the runtime
// (the .cpp files beside this) is one shared object that is loaded before it. The threads of a
// block are fibers of one OS thread: a thread runs until it waits for others, then the next one
// runs. So plain globals are enough, and the order of the threads is known and can be chosen.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

namespace emu {

struct Index {
  unsigned x, y, z;
};

extern const Index* thread_index;  // of the running thread
extern Index block_index, block_size, grid_size;

// A warp-wide operation. The last lane of the mask to arrive runs it for all of them: `lanes[i]` is
// what lane i passed to `collective`, valid until its call returns.
struct Operation {
  const char* name;
  void (*run)(void** lanes, unsigned mask);
};

// End the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Meet the lanes of `mask` at `operation`; fails if one of them is at another operation or gone.
void collective(const Operation& operation, void* argument, unsigned mask = 0xffffffffu);

// Barrier `id` of the block: arrive, and wait for `threads` threads in all. 0 threads: the block.
void barrier(const char* name, unsigned id, unsigned threads, bool wait);

unsigned thread_number();  // in the block
unsigned char* dynamic_shared();

// Shared memory by its 32-bit address: dynamic memory from 1024 on, static from STATIC_SHARED on.
constexpr unsigned DYNAMIC_SHARED = 1024, STATIC_SHARED = 0x40000;
unsigned shared_address(const void* pointer);
unsigned char* shared_pointer(unsigned address, size_t bytes, size_t alignment, const char* what);
void check_global(const void* pointer, size_t bytes, size_t alignment, const char* what);

// cp.async: 16 bytes are undefined from the issue on and land when their group is waited for.
void copy_issue(unsigned shared, const void* global, bool valid);
void copy_commit();
void copy_wait(unsigned pending);

// mbarrier and the copy engine. A copy lands when nothing else can go on; its target is undefined
// from the issue on. `map` is the emulated TMap (device.py fills it in).
void mbarrier_init(unsigned shared, unsigned arrivals);
void mbarrier_arrive(unsigned shared, unsigned expected_bytes);
void mbarrier_wait(unsigned shared, unsigned parity);
void tensor_copy(unsigned shared, const void* map, int x, int y, unsigned barrier);

// wgmma. `a_registers` null: A by descriptor. The accumulators are undefined from the issue to the
// wait of their group, and then hold the products in order.
void wgmma_fence();
void wgmma_issue(float* d, int columns, const unsigned* a_registers, uint64_t a, uint64_t b,
                 bool accumulate);
void wgmma_commit();
void wgmma_wait(unsigned pending);
void wgmma_check_ready(const float* d);

// ldmatrix.x4 and mma.m16n8k16 of the running warp, by the layouts that ptx.cuh states.
void load_matrices(unsigned (&registers)[4], unsigned shared_row, bool transposed);
void multiply_accumulate(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

}  // namespace emu
