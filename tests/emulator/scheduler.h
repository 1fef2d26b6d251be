// The runtime's own view of threads and launches, and the switch between two fibers.
#pragma once

#include <stdint.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <vector>

#include "runtime.h"

namespace emu {

#ifdef __x86_64__
struct Context {
  void* stack_pointer;
};
// Save the callee-saved registers on the running stack and go on where the other one stopped.
extern "C" void emu_switch(void** save, void* load);
inline void switch_context(Context& from, Context& to) {
  emu_switch(&from.stack_pointer, to.stack_pointer);
}
inline void make_context(Context& context, void*, unsigned char* top, void (*entry)()) {
  void** words = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, no caller
  for (int i = 0; i < 6; i++) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(entry);
  words[7] = nullptr;
  context.stack_pointer = words;
}
#else
struct Context {
  ucontext_t machine;
};
inline void switch_context(Context& from, Context& to) {
  swapcontext(&from.machine, &to.machine);
}
inline void make_context(Context& context, void* stack, unsigned char* top, void (*entry)()) {
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = top - static_cast<unsigned char*>(stack);
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
}
#endif

enum State { RUNNABLE, AT_OPERATION, AT_BARRIER, AT_TRANSACTION, FINISHED };

struct Thread {
  Context context;
  Index index;
  unsigned warp, lane;
  State state;
  const Operation* operation;  // AT_OPERATION
  unsigned mask;
  const char* name;  // AT_BARRIER, AT_TRANSACTION
  unsigned barrier;  // its id, or the shared address of the mbarrier
  unsigned parity;
};

// One launch as the Python side fills it in; the same fields stand in device.py.
struct Launch {
  void (*call)(void** arguments);
  void** arguments;
  unsigned char *static_begin, *static_end;
  Index grid, block;
  unsigned shared_bytes, reverse, workers, padding;
  mutable uint64_t fault_address, fault_instruction;
  mutable char error[4096];
};

extern Thread* current;
extern std::vector<Thread> threads;

void wait_here();           // the running thread, whose state is set, lets others run
void wake(Thread& thread);  // it can run again
void yield_to(Thread& next);
void wake_lanes(unsigned warp, unsigned mask);
unsigned threads_in_block();
bool runs_reversed();

// Parts of a block's state that other files keep: emptied when it begins, checked when it ends.
void reset_meetings();
void reset_copies();
void reset_tensor_copies();
void reset_products();
void check_tensor_copies_done();
void check_products_done();
bool land_tensor_copy();  // one of those under way; false: there is none
void describe_barrier(unsigned id, char* text, size_t room);
void describe_transaction(unsigned shared, char* text, size_t room);

}  // namespace emu
