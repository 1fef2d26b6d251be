// Asynchronous copies and the device memory they read.
//
// The target of a copy is undefined (0xff) from its issue until it is waited for: reading too early
// or overwriting a buffer that is still read gives NaN instead of luck. Each allocation ends at a
// page without access, and stays without access once it is released.
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <map>
#include <vector>

#include "scheduler.h"

namespace emu {
namespace {

constexpr size_t PAGE = 4096;

struct Copy {
  unsigned shared;
  const void* global;
  bool valid;
  unsigned group;
};
struct Queue {
  std::vector<Copy> copies;
  unsigned landed, open_group;
};
std::vector<Queue> queues;

struct Allocation {
  size_t bytes, mapped;
  unsigned char* mapping;
};
std::map<uint64_t, Allocation> allocations;  // by address
uint64_t last_begin, last_end;

Queue& own_queue() { return queues[thread_number()]; }

}  // namespace

void reset_copies() {
  queues.resize(threads.size());
  for (Queue& queue : queues) {
    queue.copies.clear();
    queue.landed = queue.open_group = 0;
  }
}

void copy_issue(unsigned shared, const void* global, bool valid) {
  memset(shared_pointer(shared, 16, 16, "cp.async"), 0xff, 16);
  if (valid) check_global(global, 16, 16, "cp.async");
  Queue& queue = own_queue();
  queue.copies.push_back({shared, global, valid, queue.open_group});
}

void copy_commit() { own_queue().open_group++; }

void copy_wait(unsigned pending) {
  Queue& queue = own_queue();
  for (; queue.landed < queue.copies.size(); queue.landed++) {
    const Copy& copy = queue.copies[queue.landed];
    if (copy.group + pending >= queue.open_group) break;
    unsigned char* target = shared_pointer(copy.shared, 16, 16, "cp.async");
    if (copy.valid)
      memcpy(target, copy.global, 16);
    else
      memset(target, 0, 16);
  }
  if (queue.landed == queue.copies.size()) {
    queue.copies.clear();
    queue.landed = 0;
  }
}

void check_global(const void* pointer, size_t bytes, size_t alignment, const char* what) {
  const uint64_t at = reinterpret_cast<uint64_t>(pointer);
  if (at % alignment)
    fail("%s: global address 0x%llx is not %zu-byte aligned", what, (unsigned long long)at,
         alignment);
  if (at >= last_begin && at + bytes <= last_end) return;
  auto found = allocations.upper_bound(at);
  if (found != allocations.begin()) {
    --found;
    if (at + bytes <= found->first + found->second.bytes) {
      last_begin = found->first;
      last_end = found->first + found->second.bytes;
      return;
    }
  }
  fail("%s: %zu bytes at 0x%llx are outside every device allocation", what, bytes,
       (unsigned long long)at);
}

}  // namespace emu

using namespace emu;

// Device memory that ends, up to the next multiple of 16, at a page without access. 0: none left.
extern "C" uint64_t emu_allocate(uint64_t bytes) {
  const size_t rounded = (bytes + 15) / 16 * 16, room = (rounded + PAGE - 1) / PAGE * PAGE;
  const size_t mapped = room + 2 * PAGE;
  void* found = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return 0;
  auto* mapping = static_cast<unsigned char*>(found);
  mprotect(mapping, PAGE, PROT_NONE);
  mprotect(mapping + PAGE + room, PAGE, PROT_NONE);
  memset(mapping + PAGE, 0xff, room);
  const uint64_t address = reinterpret_cast<uint64_t>(mapping + PAGE + room - rounded);
  allocations[address] = {bytes, mapped, mapping};
  return address;
}

// The addresses are never given out again, so that a use after the release is a fault.
extern "C" void emu_release(uint64_t address) {
  const auto found = allocations.find(address);
  if (found == allocations.end()) return;
  mmap(found->second.mapping, found->second.mapped, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  allocations.erase(found);
  last_begin = last_end = 0;
}

// Addresses for memory of another process: nothing behind them, and a page on each side that stays
// so. 0: none left.
extern "C" uint64_t emu_window_reserve(uint64_t bytes) {
  void* found = mmap(nullptr, bytes + 2 * PAGE, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return found == MAP_FAILED ? 0 : reinterpret_cast<uint64_t>(found) + PAGE;
}

// Put a file of exactly `bytes` behind a window. 0, or an errno. The mapping outlives the descriptor.
extern "C" int emu_window_map(uint64_t address, uint64_t bytes, int fd) {
  struct stat file;
  if (fstat(fd, &file)) return errno;
  if (static_cast<uint64_t>(file.st_size) != bytes) return EINVAL;
  if (mmap(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
           fd, 0) == MAP_FAILED)
    return errno;
  allocations[address] = {bytes, 0, nullptr};
  return 0;
}

extern "C" void emu_window_unmap(uint64_t address, uint64_t bytes) {
  mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  allocations.erase(address);
  last_begin = last_end = 0;
}
