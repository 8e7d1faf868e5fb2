// A small SIMT machine on the CPU: it runs the kernels of a .cu file, compiled by the host compiler with -DMCV_SIMT.
//
// Every thread of a block is a fiber. Between two meeting points (__syncthreads, a shuffle) the threads run one after
// the other in random order, so a missing barrier shows as a wrong result; shared memory starts as NaN, in a heap
// block of its own size, so AddressSanitizer sees an index out of bounds. Threads that wait for each other at
// different places are reported as a deadlock. What it can't show: memory order across warps, occupancy, and the last
// digits of the GPU's own functions.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define MCV_KERNEL(threads, blocks_per_multiprocessor) static void
#define MCV_ARGUMENT(type) const type&
#define MCV_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), mcv::simt::run(blocks, threads, [&] { kernel(__VA_ARGS__); }))
#define MCV_SHARED(type, name, count) \
  static const char name##_key = 0;   \
  type* const name = static_cast<type*>(mcv::simt::shared(&name##_key, sizeof(type) * (count)))

struct Place {
  unsigned x;
};
inline Place threadIdx, blockIdx, blockDim, gridDim;

namespace mcv {
namespace simt {

constexpr int kDeadlock = 10001;  // beyond the codes of cudaError_t
constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32;

struct Context {
  ucontext_t start;
  jmp_buf place;  // where it left off
  bool has_started = false;
};

struct Fiber {
  enum State { kReady, kAtBarrier, kAtShuffle, kDone } state = kReady;
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

struct Warp {
  uint64_t value[2][kWarp];  // the next shuffle may begin while the last one is still being read
  unsigned arrived = 0, parity = 0;
};

struct Block {
  unsigned threads;
  std::vector<Warp> warps;
  std::vector<unsigned> ready;
  std::map<const void*, std::unique_ptr<char[]>> memory;
  std::function<void()> body;
  Context scheduler;
  unsigned current = 0;
};

inline Block* block = nullptr;
inline std::vector<std::unique_ptr<Fiber>> fibers;  // kept: a fiber plays one thread after the other
inline std::mt19937 generator;

#if defined(__SANITIZE_ADDRESS__)
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_size = 0;
#endif

// From the scheduler to a fiber, or back (`to_fiber` null). AddressSanitizer follows swapcontext alone; longjmp is many
// times as fast, because it leaves the signal mask as it is.
inline void switch_to(Context* from, Context* to, const Fiber* to_fiber) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(
      &fake, to_fiber ? to_fiber->stack.get() : scheduler_stack, to_fiber ? kStack : scheduler_size);
  swapcontext(&from->start, &to->start);
  if (to_fiber) __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  else __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#else
  if (_setjmp(from->place)) return;
  from->has_started = true;
  if (to->has_started) _longjmp(to->place, 1);
  setcontext(&to->start);
  (void)to_fiber;
#endif
}

inline void yield() { switch_to(&fibers[block->current]->context, &block->scheduler, nullptr); }

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  while (true) {
    block->body();
    fibers[block->current]->state = Fiber::kDone;
    yield();
  }
}

inline void add_fiber() {
  fibers.emplace_back(new Fiber);
  ucontext_t& start = fibers.back()->context.start;
  getcontext(&start);
  start.uc_stack.ss_sp = fibers.back()->stack.get(), start.uc_stack.ss_size = kStack, start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
}

inline void* shared(const void* key, size_t size) {
  std::unique_ptr<char[]>& memory = block->memory[key];
  if (!memory) {
    memory.reset(new char[size]);  // as large as asked for: what lies behind it is AddressSanitizer's
    memset(memory.get(), 0xff, size);
  }
  return memory.get();
}

inline void wait(Fiber::State state) {
  fibers[block->current]->state = state;
  yield();
}

inline void make_ready(unsigned thread) {
  fibers[thread]->state = Fiber::kReady;
  block->ready.push_back(thread);
}

inline bool release_barrier() {
  bool found = false;
  for (unsigned thread = 0; thread < block->threads; ++thread) {
    if (fibers[thread]->state == Fiber::kAtShuffle) return false;
  }
  for (unsigned thread = 0; thread < block->threads; ++thread) {
    if (fibers[thread]->state == Fiber::kAtBarrier) make_ready(thread), found = true;
  }
  return found;
}

template <class T>
T shuffle(T mine, unsigned source) {
  const unsigned thread = block->current, lane = thread % kWarp, first = thread - lane;
  Warp& warp = block->warps[thread / kWarp];
  const unsigned parity = warp.parity;
  memcpy(&warp.value[parity][lane], &mine, sizeof(T));
  if (++warp.arrived == kWarp) {
    warp.arrived = 0, warp.parity ^= 1;
    for (unsigned other = first; other < first + kWarp; ++other) {
      if (other != thread) make_ready(other);
    }
    block->ready.push_back(thread);
    yield();  // the last to come isn't the first to go on
  } else {
    wait(Fiber::kAtShuffle);
  }
  T theirs;
  memcpy(&theirs, &warp.value[parity][source], sizeof(T));
  return theirs;
}

// Runs one block. False: threads wait for each other.
inline bool run_block() {
  Block& b = *block;
  b.memory.clear();
  b.ready.clear();
  for (Warp& warp : b.warps) warp = Warp();
  for (unsigned thread = 0; thread < b.threads; ++thread) make_ready(thread);
  while (true) {
    if (b.ready.empty() && !release_barrier()) break;
    std::swap(b.ready[generator() % b.ready.size()], b.ready.back());
    b.current = b.ready.back();
    b.ready.pop_back();
    threadIdx.x = b.current;
    switch_to(&b.scheduler, &fibers[b.current]->context, fibers[b.current].get());
  }
  for (unsigned thread = 0; thread < b.threads; ++thread) {
    if (fibers[thread]->state != Fiber::kDone) return false;
  }
  return true;
}

// Runs all blocks, in random order. Returns 0 or kDeadlock.
inline int run(unsigned blocks, unsigned threads, std::function<void()> body) {
  Block machine;
  while (fibers.size() < threads) add_fiber();
  machine.threads = threads, machine.warps.resize((threads + kWarp - 1) / kWarp);
  machine.body = std::move(body);
  block = &machine;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), generator);
  gridDim.x = blocks, blockDim.x = threads;
  bool is_done = true;
  for (const unsigned place : order) {
    blockIdx.x = place;
    is_done = is_done && run_block();
  }
  block = nullptr;
  if (!is_done) fibers.clear();  // some hang in the middle of the kernel
  return is_done ? 0 : kDeadlock;
}

}  // namespace simt
}  // namespace mcv

inline void __syncthreads() { mcv::simt::wait(mcv::simt::Fiber::kAtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return mcv::simt::shuffle(x, (threadIdx.x % mcv::simt::kWarp) ^ unsigned(mask));
}

extern "C" __attribute__((visibility("default"), used)) inline void mcv_simt_seed(uint64_t seed) {
  mcv::simt::generator.seed(static_cast<std::mt19937::result_type>(seed));
}
