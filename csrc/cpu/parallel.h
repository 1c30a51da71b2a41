// parallel_for over the threads the process already has.
//
// torch brings an OpenMP runtime whose idle workers spin for a while after every parallel region. A second pool would
// compete with those spinning workers for the cores. So regions run on that runtime if the process has one (found by
// name, never linked), and on plain threads otherwise.
#ifndef CCU_FAST_CPU_PARALLEL_H_
#define CCU_FAST_CPU_PARALLEL_H_

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace ccu {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline GompParallel gomp_parallel() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// The largest team since it was last read, for tests. (One for all instruction sets: it has no arithmetic.)
inline std::atomic<int>& largest_team() {
  static std::atomic<int> team{1};
  return team;
}

// How many of `threads` are worth waking for work that moves `bytes` and does `fmas` multiply-adds (or an equally long
// computation): each gets at least 25 us of work, several times the cost of starting a team when no thread must wait
// for a core, so small calls wake none. In 1 ns one core moves about 8 bytes or does 16 fp32 multiply-adds. (static:
// each instruction set has its own copy.)
static inline int threads_for(int threads, double bytes, double fmas = 0.0) {
  const double worth = (bytes / 8.0 + fmas / 16.0) / 25000.0;
  return worth < 1.0 ? 1 : worth < threads ? static_cast<int>(worth) : threads;
}

// Calls body(task) once for every task in [0, tasks). Which thread runs which task is not fixed: a body must write
// only what belongs to its task, and then the result does not depend on the number of threads.
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  int largest = largest_team().load(std::memory_order_relaxed);
  while (largest < threads && !largest_team().compare_exchange_weak(largest, threads, std::memory_order_relaxed)) {
  }
  struct Region {
    const Body* body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    static void run(void* self) {
      auto* region = static_cast<Region*>(self);
      for (int64_t task; (task = region->next.fetch_add(1, std::memory_order_relaxed)) < region->tasks;)
        (*region->body)(task);
    }
  } region{&body, tasks};
  if (const GompParallel parallel = gomp_parallel()) {
    parallel(&Region::run, &region, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int t = 1; t < threads; ++t) others.emplace_back(&Region::run, &region);
  } catch (const std::system_error&) {
    // The system may give fewer threads; those share the work.
  }
  Region::run(&region);
  for (auto& other : others) other.join();
}

}  // namespace ccu

#endif  // CCU_FAST_CPU_PARALLEL_H_
