// The scheduler of the emulator: blocks one after another, their threads as fibers; faults become
// errors.
//
// Shared memory is 0xff in every byte when a block begins (NaN as float and as bf16) and ends at a
// page without access. A launch in which no thread can go on is an error that says what each waits
// for, never a hang. `emu_launch` may share the blocks with forked processes: device memory is
// mapped shared.
#include "runtime.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <vector>

#include "scheduler.h"

namespace emu {

const Index* thread_index;
Index block_index, block_size, grid_size;
Thread* current;
std::vector<Thread> threads;
static unsigned thread_count;

namespace {

constexpr size_t STACK_BYTES = 96 << 10, PAGE = 4096, MAX_THREADS = 1024, MAX_SHARED = 228 << 10;
const Launch* launch;
uint32_t runnable[32];  // lanes of each warp that can run
uint64_t ready;         // warps with such a lane
unsigned live;
Context main_context;
bool failed;
unsigned char *stacks, *shared_end, *shared_begin;
size_t shared_bytes;

unsigned char* reserve(size_t bytes) {
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) abort();
  return static_cast<unsigned char*>(found);
}

void prepare() {
  if (stacks) return;
  stacks = reserve(STACK_BYTES * MAX_THREADS);
  for (size_t i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK_BYTES, PAGE, PROT_NONE);
  const size_t room = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
  unsigned char* window = reserve(room + 2 * PAGE);
  mprotect(window, PAGE, PROT_NONE);
  mprotect(window + PAGE + room, PAGE, PROT_NONE);
  shared_end = window + PAGE + room;
  stack_t alternative = {};
  alternative.ss_size = 64 << 10;
  alternative.ss_sp = reserve(alternative.ss_size);
  sigaltstack(&alternative, nullptr);
  threads.resize(MAX_THREADS);
}

void set_runnable(Thread& thread) {
  thread.state = RUNNABLE;
  runnable[thread.warp] |= 1u << thread.lane;
  ready |= 1ull << thread.warp;
}

void clear_runnable(Thread& thread) {
  runnable[thread.warp] &= ~(1u << thread.lane);
  if (!runnable[thread.warp]) ready &= ~(1ull << thread.warp);
}

// The running warp goes on as long as one of its lanes can; then the first (or last) that can.
Thread* pick() {
  if (!ready) return nullptr;
  unsigned warp = current->warp;
  if (!runnable[warp])
    warp = launch->reverse ? 63 - __builtin_clzll(ready) : __builtin_ctzll(ready);
  const unsigned lanes = runnable[warp];
  const unsigned lane = launch->reverse ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes);
  return &threads[warp * 32 + lane];
}

// A thread that can go on, if need be after copies have landed.
Thread* next_thread() {
  Thread* next;
  while (!(next = pick()) && land_tensor_copy()) {
  }
  return next;
}

void enter(Thread* next) {
  current = next;
  thread_index = &next->index;
}

[[noreturn]] void leave() {
  Context ignored;
  switch_context(ignored, main_context);
  __builtin_unreachable();
}

const char* describe(const Thread& thread, char* text, size_t room) {
  switch (thread.state) {
    case FINISHED: return "has ended";
    case RUNNABLE: return "can run";
    case AT_OPERATION: snprintf(text, room, "waits at %s", thread.operation->name); break;
    case AT_BARRIER:
      snprintf(text, room, "waits at %s, ", thread.name);
      describe_barrier(thread.barrier, text + strlen(text), room - strlen(text));
      break;
    case AT_TRANSACTION:
      snprintf(text, room, "waits at %s for parity %u of ", thread.name, thread.parity);
      describe_transaction(thread.barrier, text + strlen(text), room - strlen(text));
      break;
  }
  return text;
}

[[noreturn]] void report_deadlock() {
  char text[3072], one[160], other[160];
  size_t used = 0;
  for (unsigned first = 0; first < thread_count && used + 200 < sizeof text;) {
    const char* what = describe(threads[first], one, sizeof one);
    unsigned last = first;
    while (last + 1 < thread_count &&
           !strcmp(what, describe(threads[last + 1], other, sizeof other)))
      last++;
    used += snprintf(text + used, sizeof text - used, "%sthreads %u-%u: %s", first ? "; " : "",
                     first, last, what);
    first = last + 1;
  }
  fail("no thread can go on: %s", text);
}

void thread_main() {
  launch->call(launch->arguments);
  current->state = FINISHED;
  clear_runnable(*current);
  live--;
  if (Thread* next = live ? next_thread() : nullptr) {
    Context ignored;
    enter(next);
    switch_context(ignored, next->context);
  }
  if (live) report_deadlock();
  check_tensor_copies_done();
  check_products_done();
  leave();
}

void on_fault(int number, siginfo_t* info, void* context) {
  const auto* machine = static_cast<const ucontext_t*>(context);
  launch->fault_address = reinterpret_cast<uint64_t>(info->si_addr);
#ifdef __x86_64__
  launch->fault_instruction = static_cast<uint64_t>(machine->uc_mcontext.gregs[REG_RIP]);
#else
  (void)machine;
#endif
  const auto at = launch->fault_address, stack = reinterpret_cast<uint64_t>(stacks);
  if (number == SIGSEGV && at >= stack && at < stack + STACK_BYTES * MAX_THREADS)
    fail("local memory overflows the emulator's stack of %zu bytes", STACK_BYTES);
  if (number == SIGILL || number == SIGTRAP)
    fail("trap: a misaligned access or an index outside an array");
  if (number == SIGFPE) fail("integer division by zero");
  fail("access outside device memory");
}

// What lies behind the dynamic shared memory; not the poison, which a mask of all ones equals.
constexpr unsigned char UNTOUCHED = 0x5a;

void run_block() {
  shared_bytes = launch->shared_bytes;
  shared_begin = shared_end - (shared_bytes + 1023) / 1024 * 1024;
  memset(shared_begin, 0xff, shared_bytes);
  memset(shared_begin + shared_bytes, UNTOUCHED, shared_end - shared_begin - shared_bytes);
  memset(launch->static_begin, 0xff, launch->static_end - launch->static_begin);
  memset(runnable, 0, sizeof runnable);
  ready = 0;
  live = thread_count;
  for (unsigned i = 0; i < thread_count; i++) {
    Thread& thread = threads[i];
    thread.index = {i % block_size.x, i / block_size.x % block_size.y,
                    i / block_size.x / block_size.y};
    thread.warp = i / 32;
    thread.lane = i % 32;
    // Tops at different cache sets: all stacks at the same distance would share a few of them.
    const size_t colour = i * 704 % 16384 / 64 * 64;
    unsigned char* top = stacks + (i + 1) * STACK_BYTES - colour;
    make_context(thread.context, stacks + i * STACK_BYTES, top, thread_main);
    set_runnable(thread);
  }
  reset_meetings();
  reset_copies();
  reset_tensor_copies();
  reset_products();
  current = &threads[launch->reverse ? thread_count - 1 : 0];
  enter(pick());
  switch_context(main_context, current->context);
  if (failed) return;
  for (unsigned char* p = shared_begin + shared_bytes; p < shared_end; p++)
    if (*p != UNTOUCHED) {
      current = nullptr;
      failed = true;
      snprintf(launch->error, sizeof launch->error,
               "block (%u, %u, %u): wrote past the end of %zu bytes of dynamic shared memory",
               block_index.x, block_index.y, block_index.z, shared_bytes);
      return;
    }
}

void run_blocks(unsigned first, unsigned step) {
  const unsigned total = grid_size.x * grid_size.y * grid_size.z;
  for (unsigned i = first; i < total && !failed; i += step) {
    const unsigned number = launch->reverse ? total - 1 - i : i;
    block_index = {number % grid_size.x, number / grid_size.x % grid_size.y,
                   number / grid_size.x / grid_size.y};
    run_block();
  }
}

}  // namespace

void fail(const char* format, ...) {
  int used = snprintf(launch->error, sizeof launch->error, "block (%u, %u, %u), thread %u: ",
                      block_index.x, block_index.y, block_index.z, thread_number());
  va_list list;
  va_start(list, format);
  vsnprintf(launch->error + used, sizeof launch->error - used, format, list);
  va_end(list);
  failed = true;
  leave();
}

void wait_here() {
  Thread* self = current;
  clear_runnable(*self);
  Thread* next = next_thread();
  if (!next) report_deadlock();
  if (next == self) return;
  enter(next);
  switch_context(self->context, next->context);
}

void wake(Thread& thread) { set_runnable(thread); }

void yield_to(Thread& next) {
  Thread* self = current;
  enter(&next);
  switch_context(self->context, next.context);
}

void wake_lanes(unsigned warp, unsigned mask) {
  runnable[warp] |= mask;
  ready |= 1ull << warp;
}

unsigned thread_number() { return static_cast<unsigned>(current - threads.data()); }
unsigned threads_in_block() { return thread_count; }
bool runs_reversed() { return launch->reverse; }

unsigned char* dynamic_shared() { return shared_begin; }

unsigned shared_address(const void* pointer) {
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (p >= shared_begin && p <= shared_begin + shared_bytes)
    return DYNAMIC_SHARED + static_cast<unsigned>(p - shared_begin);
  if (p >= launch->static_begin && p < launch->static_end)
    return STATIC_SHARED + static_cast<unsigned>(p - launch->static_begin);
  fail("a shared address is taken of %p, which is not in shared memory", pointer);
}

unsigned char* shared_pointer(unsigned address, size_t bytes, size_t alignment, const char* what) {
  const bool is_static = address >= STATIC_SHARED;
  const size_t size = is_static ? launch->static_end - launch->static_begin : shared_bytes;
  const size_t offset = address - (is_static ? STATIC_SHARED : DYNAMIC_SHARED);
  if (address < DYNAMIC_SHARED || offset + bytes > size)
    fail("%s: %zu bytes at shared address 0x%x, outside the block's %zu bytes of %s memory", what,
         bytes, address, size, is_static ? "static" : "dynamic");
  if (address % alignment)
    fail("%s: shared address 0x%x is not %zu-byte aligned", what, address, alignment);
  return (is_static ? launch->static_begin : shared_begin) + offset;
}

}  // namespace emu

using namespace emu;

// Run a grid. 0: done; 1: `error` of the launch says what went wrong.
extern "C" int emu_launch(Launch* given) {
  prepare();
  launch = given;
  launch->error[0] = 0;
  failed = false;
  grid_size = given->grid;
  block_size = given->block;
  thread_count = block_size.x * block_size.y * block_size.z;
  struct sigaction action = {}, before[5];
  const int signals[5] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 5; i++) sigaction(signals[i], &action, &before[i]);
  pid_t child = -1;
  Launch* shared = nullptr;
  if (given->workers > 1) {
    shared = static_cast<Launch*>(mmap(nullptr, sizeof(Launch), PROT_READ | PROT_WRITE,
                                       MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    if (shared != MAP_FAILED) {
      *shared = *given;
      child = fork();
    }
  }
  if (child == 0) {
    launch = shared;
    run_blocks(1, 2);
    _exit(failed ? 1 : 0);
  }
  run_blocks(0, child > 0 ? 2 : 1);
  if (child > 0) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (!failed && status) {
      *given = *shared;
      if (!given->error[0]) snprintf(given->error, sizeof given->error, "a worker died");
      failed = true;
    }
  }
  if (shared) munmap(shared, sizeof(Launch));
  for (int i = 0; i < 5; i++) sigaction(signals[i], &before[i], nullptr);
  return failed;
}

#ifdef __x86_64__
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
#endif
