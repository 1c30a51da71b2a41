// Runs a kernel on a CPU: one block after another, each of its threads as a fiber of one operating system thread.
//
// A fiber runs until it reaches a barrier or a warp collective, or ends. Runnable fibers are resumed in random order,
// with some warps held back for a round, so that code that relies on an order of threads fails. A barrier opens when
// all live fibers have reached the same one; a collective when all lanes of its mask have reached it with the same
// mask. Whatever a GPU would refuse, hang on or leave undefined ends the process with an error message. Fibers are
// switched here and not by swapcontext: the 100,000 switches of a topk_flips row take 3 ms instead of 100 ms.
//
// EMULATION_SEED=n selects another order; EMULATION_SKIP=file:line leaves that __syncthreads() out.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
// EMULATION_TSAN instead of the sanitizer's macro: this file is not instrumented, because it stands for the hardware.
#ifdef EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

#ifndef __x86_64__
#error "the switch below is written for x86-64"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

extern "C" {
extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));
// Saves the registers that a call preserves on the stack, and resumes another stack that was left in the same way.
void emulation_switch(void** left, void* entered);
}
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch,@function
emulation_switch:
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
.size emulation_switch,.-emulation_switch
)");

namespace emulation {
namespace {

constexpr unsigned kMostThreads = 1024, kWarp = 32;
constexpr size_t kStackBytes = 256 << 10, kFrame = 7 * 64, kMostShared = 48 << 10, kMostParameters = 4096;

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan = nullptr;
  void* tsan = nullptr;
  State state = State::kDone;
  Place place{"", 0};
  uint3 index{0, 0, 0};
  unsigned mask = 0;
  uint64_t value = 0;
};

struct Trapped {};  // thrown by __trap()

Fiber fibers[kMostThreads];
uint64_t exchanged[kMostThreads];  // the values of the lanes in the last collective of each warp
unsigned current = 0;
void* scheduler = nullptr;  // its stack pointer, while a fiber runs
void (*body)(void*) = nullptr;
void* body_context = nullptr;
cudaError_t last_error = cudaSuccess;
bool trapped = false;

uint64_t random_number() {
  static uint64_t state = 88172645463325252ull ^ [] {
    const char* seed = std::getenv("EMULATION_SEED");
    return seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10) * 0x9e3779b97f4a7c15ull;
  }();
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

// A multiplication: the remainder of a division would take longer than the rest of a switch.
unsigned random_below(unsigned end) { return static_cast<unsigned>((random_number() >> 32) * end >> 32); }

[[noreturn]] void die(const std::string& what, Place place) {
  std::fprintf(stderr, "emulated GPU: %s at %s:%d (block %u, thread %u)\n", what.c_str(), place.file, place.line,
               blockIdx.x, current);
  std::abort();
}

// Tells the sanitizers about every switch, and about the order that barriers impose.
#ifdef __SANITIZE_ADDRESS__
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void leave_for_scheduler(Fiber& f, bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.asan, scheduler_bottom, scheduler_size);
}
void arrived_in_fiber(void* fake) { __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size); }
void* leave_for_fiber(Fiber& f) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, kStackBytes);
  return fake;
}
void arrived_in_scheduler(void* fake) { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
#elif defined(EMULATION_TSAN)
void* scheduler_tsan = nullptr;
constexpr unsigned kNoOrder = 1;  // a switch is not a synchronisation
void leave_for_scheduler(Fiber&, bool) { __tsan_switch_to_fiber(scheduler_tsan, kNoOrder); }
void arrived_in_fiber(void*) {}
void* leave_for_fiber(Fiber& f) {
  __tsan_switch_to_fiber(f.tsan, kNoOrder);
  return nullptr;
}
void arrived_in_scheduler(void*) {}
#else
void leave_for_scheduler(Fiber&, bool) {}
void arrived_in_fiber(void*) {}
void* leave_for_fiber(Fiber&) { return nullptr; }
void arrived_in_scheduler(void*) {}
#endif

#ifdef EMULATION_TSAN
char start_order, end_order, barrier_order, warp_order[kMostThreads / kWarp];
void before_order(void* what) { __tsan_release(what); }
void after_order(void* what) { __tsan_acquire(what); }
void enter_block(unsigned threads) {
  scheduler_tsan = __tsan_get_current_fiber();
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].tsan == nullptr) fibers[i].tsan = __tsan_create_fiber(0);
  __tsan_release(&start_order);
}
void leave_block() { __tsan_acquire(&end_order); }
#else
char start_order, end_order, barrier_order, warp_order[kMostThreads / kWarp];
void before_order(void*) {}
void after_order(void*) {}
void enter_block(unsigned) {}
void leave_block() {}
#endif

bool same(Place a, Place b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

void wait(State state, Place place) {
  Fiber& f = fibers[current];
  f.state = state;
  f.place = place;
  leave_for_scheduler(f, false);
  emulation_switch(&f.stack_pointer, scheduler);
  arrived_in_fiber(f.asan);
}

void first_of_fiber() {
  arrived_in_fiber(nullptr);
  after_order(&start_order);
  try {
    body(body_context);
  } catch (const Trapped&) {
    trapped = true;
  }
  before_order(&end_order);
  Fiber& f = fibers[current];
  f.state = State::kDone;
  leave_for_scheduler(f, true);
  emulation_switch(&f.stack_pointer, scheduler);
  std::abort();
}

void resume(unsigned i) {
  Fiber& f = fibers[i];
  current = i;
  threadIdx = f.index;
  void* fake = leave_for_fiber(f);
  emulation_switch(&scheduler, f.stack_pointer);
  arrived_in_scheduler(fake);
}

void start(Fiber& f) {
  // Tops at equal offsets would all take the same few lines of the caches, and every switch would miss them.
  const size_t apart = static_cast<size_t>(&f - fibers) * kFrame % (kStackBytes / 8);
  void** top = reinterpret_cast<void**>(f.stack + kStackBytes - apart);
  *--top = nullptr;  // in place of a return address: keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&first_of_fiber);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f.stack_pointer = top;
  f.state = State::kReady;
}

// Resumes the lanes of a complete collective; returns whether the warp that begins at thread `first` had one.
bool open_collective(unsigned first, unsigned threads) {
  bool opened = false;
  const unsigned end = std::min(threads, first + kWarp);
  for (unsigned i = first; i < end; ++i) {
    const Fiber& f = fibers[i];
    if (f.state != State::kAtCollective) continue;
    if (!(f.mask >> (i - first) & 1)) die("a lane is not in the mask of its own collective", f.place);
    bool complete = true;
    for (unsigned l = 0; l < kWarp && complete; ++l) {
      if (!(f.mask >> l & 1)) continue;
      if (first + l >= threads || fibers[first + l].state == State::kDone)
        die("a lane of the mask has ended before the collective", f.place);
      const Fiber& other = fibers[first + l];
      complete = other.state == State::kAtCollective && same(other.place, f.place) && other.mask == f.mask;
    }
    if (!complete) continue;
    const unsigned mask = f.mask;
    for (unsigned l = 0; l < kWarp; ++l)
      if (mask >> l & 1) {
        exchanged[first + l] = fibers[first + l].value;
        fibers[first + l].state = State::kReady;
      }
    opened = true;
  }
  return opened;
}

// Resumes all fibers at the barrier; false if all fibers are done.
bool open_barrier(unsigned threads) {
  const Fiber* at_barrier = nullptr;
  const Fiber* at_collective = nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == State::kAtCollective) at_collective = &f;
    if (f.state != State::kAtBarrier) continue;
    if (at_barrier != nullptr && !same(at_barrier->place, f.place))
      die("threads of a block wait at different barriers, the other at line " + std::to_string(at_barrier->place.line),
          f.place);
    at_barrier = &f;
  }
  if (at_collective != nullptr) die("a collective that not all lanes of its mask reach", at_collective->place);
  if (at_barrier == nullptr) return false;
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].state == State::kDone) die("a thread of the block has ended before the barrier", at_barrier->place);
    fibers[i].state = State::kReady;
  }
  return true;
}

void run_block(unsigned threads) {
  for (char* p = __start_emulated_shared; p < __stop_emulated_shared; ++p)
    *p = static_cast<char>(random_number() | 0x81);
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    start(fibers[i]);
  }
  enter_block(threads);
  std::vector<unsigned> ready;
  do {
    bool ran = true;
    while (ran && !trapped) {
      ready.clear();
      for (unsigned i = 0; i < threads; ++i)
        if (fibers[i].state == State::kReady) ready.push_back(i);
      ran = !ready.empty();
      for (unsigned i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[random_below(i)]);
      const uint64_t held_back = random_number() & random_number();
      for (unsigned i : ready)
        if (!trapped && !(held_back >> (i / kWarp) & 1)) resume(i);
      for (unsigned first = 0; first < threads && !trapped; first += kWarp) ran |= open_collective(first, threads);
    }
  } while (!trapped && open_barrier(threads));
  leave_block();
}

bool left_out(Place place) {
  static const char* skip = std::getenv("EMULATION_SKIP");
  if (skip == nullptr) return false;
  const char* name = std::strrchr(place.file, '/');
  return std::string(name == nullptr ? place.file : name + 1) + ":" + std::to_string(place.line) == skip;
}

}  // namespace

void block_barrier(Place place) {
  if (left_out(place)) return;
  before_order(&barrier_order);
  wait(State::kAtBarrier, place);
  after_order(&barrier_order);
}

const uint64_t* exchange(unsigned mask, uint64_t mine, Place place) {
  const unsigned first = current / kWarp * kWarp;
  fibers[current].mask = mask;
  fibers[current].value = mine;
  wait(State::kAtCollective, place);
  return exchanged + first;
}

void warp_barrier(unsigned mask, Place place) {
  void* order = &warp_order[current / kWarp];
  before_order(order);
  exchange(mask, 0, place);
  after_order(order);
}

void trap() { throw Trapped{}; }

int lane() { return static_cast<int>(current % kWarp); }

int64_t launched = 0;

void run(const Launch& how, size_t parameter_bytes, void (*thread)(void*), void* context) {
  const uint64_t threads = uint64_t{how.block.x} * how.block.y * how.block.z;
  const bool fits = threads >= 1 && threads <= kMostThreads && how.block.z <= 64 && how.grid.x >= 1 &&
                    how.grid.x <= 0x7fffffffu && how.grid.y >= 1 && how.grid.y <= 65535 && how.grid.z >= 1 &&
                    how.grid.z <= 65535 && how.shared <= kMostShared && parameter_bytes <= kMostParameters;
  if (!fits || trapped) {
    last_error = trapped ? cudaErrorLaunchFailure : cudaErrorInvalidConfiguration;
    return;
  }
  ++launched;
  if (fibers[0].stack == nullptr)
    for (Fiber& f : fibers)
      f.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  blockDim = how.block;
  gridDim = how.grid;
  body = thread;
  body_context = context;
  for (unsigned z = 0; z < how.grid.z; ++z)
    for (unsigned y = 0; y < how.grid.y; ++y)
      for (unsigned x = 0; x < how.grid.x && !trapped; ++x) {
        blockIdx = {x, y, z};
        run_block(static_cast<unsigned>(threads));
      }
  if (trapped) last_error = cudaErrorLaunchFailure;
}

}  // namespace emulation

extern "C" {
cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "unspecified launch failure";
  }
}
cudaError_t cudaHostGetDevicePointer(void** there, void* here, unsigned) {
  *there = here;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// How many kernels were launched since the last call. After a trap, kernels can be launched again.
__attribute__((visibility("default"))) int64_t emulation_launches() { return std::exchange(emulation::launched, 0); }
__attribute__((visibility("default"))) void emulation_recover() { emulation::trapped = false; }
// Few, so that grid-stride loops iterate.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;
  return cudaSuccess;
}
}
