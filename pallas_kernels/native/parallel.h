// Work shared among the threads of XLA's own pool.
//
// The rule: chunks are claimed from an atomic counter, the caller claims until none is left, and nobody ever waits for
// a task that has not started. So a busy or tiny pool costs nothing but its help: a task that starts late finds no
// chunk and returns without touching anything of the caller's.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace realm {

// One turn of a loop that waits for a running thread.
inline void relax(int spins) {
  if (spins >= 2000) return std::this_thread::yield();  // that thread may need this core
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One phase: fn(chunk) for every chunk in 0..chunks-1, each exactly once.
template <class F>
struct Phase {
  int64_t chunks;
  F fn;
};
template <class F>
Phase(int64_t, F) -> Phase<F>;

namespace internal {

struct Counters {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

// Claims chunks until none is left, then waits for those that other, started, threads hold.
template <class F>
void work(Counters& counters, const Phase<F>& phase) {
  int64_t chunk;
  while ((chunk = counters.next.fetch_add(1, std::memory_order_relaxed)) < phase.chunks) {
    phase.fn(chunk);
    counters.done.fetch_add(1, std::memory_order_acq_rel);
  }
  for (int spins = 0; counters.done.load(std::memory_order_acquire) < phase.chunks; ++spins) relax(spins);
}

}  // namespace internal

// Runs the phases one after the other on up to `threads` threads (0: as many as the pool has); a phase begins when the
// one before it is done. Returns when all is done.
template <class... F>
void parallel(xla::ffi::ThreadPool& pool, int64_t threads, const Phase<F>&... phases) {
  int64_t most = 0;
  ((most = phases.chunks > most ? phases.chunks : most), ...);
  if (threads == 0) threads = pool.num_threads();
  if (threads > most) threads = most;
  if (threads <= 1) {
    auto alone = [](const auto& phase) {
      for (int64_t i = 0; i < phase.chunks; ++i) phase.fn(i);
    };
    (alone(phases), ...);
    return;
  }
  constexpr int n = sizeof...(F);
  struct Shared {
    internal::Counters counters[n];
    std::atomic<bool> over{false};   // set by the caller when it returns: `run` is gone
    std::atomic<int> inside{0};      // helpers that may still touch the caller's frame
  };
  auto shared = std::make_shared<Shared>();
  auto run = [&] {
    int i = 0;
    (internal::work(shared->counters[i++], phases), ...);
  };
  for (int64_t t = 1; t < threads; ++t) {
    pool.Schedule([shared, &run] {
      shared->inside.fetch_add(1);
      if (!shared->over.load()) run();
      shared->inside.fetch_sub(1);
    });
  }
  run();
  shared->over.store(true);
  for (int spins = 0; shared->inside.load() != 0; ++spins) relax(spins);  // for threads that have started, and are leaving
}

}  // namespace realm
