// Threads that run one function together: identity, barrier and shared work counters.
//
// Kernels are written as stages of a team, so that a stage can be a whole call (one op) or one of
// hundreds in a single parallel region (the decoder). Nothing here may instantiate a template of
// the standard library: this header is compiled once per instruction set, and the linker would keep
// any one of the copies.
#pragma once
#include <sched.h>
#include <stddef.h>
#include <stdint.h>

// Inlined everywhere, so that no copy of one instruction set is left for another to call.
#define SG_TEAM inline __attribute__((always_inline))

struct SgShared {
  alignas(64) int32_t arrived;
  alignas(64) int32_t phase;
  alignas(64) int64_t* counters;  // one per stage, zero at the start
  int32_t n_counters;
};

struct SgTeam {
  int id, size;
  SgShared* shared;
  char* scratch;         // this thread's own, 64-byte aligned
  int stage = 0;
  int32_t phase = 0;

  // Wait for everybody. Spins first: stages are microseconds long; yields when a peer was descheduled.
  SG_TEAM void barrier() {
    if (size == 1) return;
    phase += 1;
    if (__atomic_add_fetch(&shared->arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&shared->arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&shared->phase, phase, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&shared->phase, __ATOMIC_ACQUIRE) != phase; spins++) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ __volatile__("yield");
#endif
      if (spins > 4000) sched_yield();
    }
  }

  // A counter that all members reach in the same order; take() hands out 0, 1, 2, ... once each.
  SG_TEAM int64_t* open() { return &shared->counters[stage++]; }
  SG_TEAM int64_t take(int64_t* counter) const {
    return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
  }
};
