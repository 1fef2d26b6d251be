// Where threads meet: warp-wide operations and the block's barriers.
//
// Lanes that come to different operations, or with different masks, are an error at once; one that
// never comes is found by the scheduler when nothing else can go on.
#include "scheduler.h"

namespace emu {
namespace {

constexpr unsigned BARRIERS = 16;

struct Warp {
  unsigned waiting;
  void* arguments[32];
};
struct Barrier {
  unsigned arrived, expected;
};

Warp warps[32];
Barrier barriers[BARRIERS];

}  // namespace

void reset_meetings() {
  memset(warps, 0, sizeof warps);
  memset(barriers, 0, sizeof barriers);
}

void describe_barrier(unsigned id, char* text, size_t room) {
  snprintf(text, room, "barrier %u, %u of %u threads there", id, barriers[id].arrived,
           barriers[id].expected);
}

void collective(const Operation& operation, void* argument, unsigned mask) {
  Thread& self = *current;
  Warp& warp = warps[self.warp];
  const unsigned bit = 1u << self.lane;
  if (!(mask & bit))
    fail("%s: lane %u is not in its own mask 0x%x", operation.name, self.lane, mask);
  self.operation = &operation;
  self.mask = mask;
  warp.arguments[self.lane] = argument;
  warp.waiting |= bit;
  if ((warp.waiting & mask) != mask) {
    self.state = AT_OPERATION;
    wait_here();
    return;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const Thread& other = threads[self.warp * 32 + __builtin_ctz(rest)];
    if (other.operation != &operation || other.mask != mask)
      fail("the warp has diverged: this lane is at %s with mask 0x%x, lane %u at %s with mask 0x%x",
           operation.name, mask, other.lane, other.operation->name, other.mask);
  }
  operation.run(warp.arguments, mask);
  warp.waiting &= ~mask;
  for (unsigned rest = mask & ~bit; rest; rest &= rest - 1)
    threads[self.warp * 32 + __builtin_ctz(rest)].state = RUNNABLE;
  wake_lanes(self.warp, mask);
}

void barrier(const char* name, unsigned id, unsigned count, bool wait) {
  if (id >= BARRIERS) fail("%s: barrier %u of 0 to 15", name, id);
  const unsigned thread_count = threads_in_block();
  if (count == 0) count = thread_count;
  if (id && (count % 32 || count > thread_count))
    fail("%s: %u threads at barrier %u, of a block of %u in whole warps", name, count, id,
         thread_count);
  Barrier& meeting = barriers[id];
  if (meeting.arrived && meeting.expected != count)
    fail("%s: barrier %u for %u threads, others came for %u", name, id, count, meeting.expected);
  meeting.expected = count;
  meeting.arrived++;
  if (meeting.arrived < count) {
    if (!wait) return;
    current->state = AT_BARRIER;
    current->name = name;
    current->barrier = id;
    wait_here();
    return;
  }
  meeting.arrived = 0;
  for (unsigned i = 0; i < thread_count; i++)
    if (threads[i].state == AT_BARRIER && threads[i].barrier == id) wake(threads[i]);
}

}  // namespace emu
