// Threads that run one function together: stages of work items, each handed out once.
//
// Kernels are written as stages of a team, so that a stage can be a whole call (one op) or one of
// hundreds in a single parallel region (the decoder). A stage ends when its items are done, not
// when every thread has come by: on a machine whose cores are shared with other processes a thread
// that was descheduled between items holds nobody up, and finds its part done when it comes back.
//
// Nothing here may instantiate a template of the standard library: this header is compiled once per
// instruction set, and the linker would keep any one of the copies.
#pragma once
#include <sched.h>
#include <stddef.h>
#include <stdint.h>

// Inlined everywhere, so that no copy of one instruction set is left for another to call.
#define SG_TEAM inline __attribute__((always_inline))

struct alignas(64) SgStage {
  int64_t taken, done;
};

struct SgTeam {
  int id, size;
  SgStage* stages;  // zero at the start, one for each call of share
  char* scratch;    // this thread's own, 64-byte aligned
  int stage = 0;

  // Run f(0) .. f(items - 1), each on one thread; returns when all are done. All members call it
  // with the same count, in the same order.
  template <class F>
  SG_TEAM void share(int64_t items, F f) {
    SgStage& s = stages[stage++];
    for (int64_t i; (i = __atomic_fetch_add(&s.taken, 1, __ATOMIC_RELAXED)) < items;) {
      f(i);
      __atomic_fetch_add(&s.done, 1, __ATOMIC_RELEASE);
    }
    // Spins first: items take microseconds; yields when the one who has the last was descheduled.
    for (int spins = 0; __atomic_load_n(&s.done, __ATOMIC_ACQUIRE) < items; spins++) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ __volatile__("yield");
#endif
      if (spins > 2000) sched_yield();
    }
  }

  // Likewise for a range cut into pieces of at least `least`: f(from, to).
  template <class F>
  SG_TEAM void share_range(int64_t count, int64_t least, F f) {
    int64_t step = count / (4 * size);
    step = step < least ? least : step;
    share((count + step - 1) / step, [&](int64_t i) {
      const int64_t to = (i + 1) * step;
      f(i * step, to < count ? to : count);
    });
  }
};
