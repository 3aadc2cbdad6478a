// Threads and scratch memory.
//
// A decode step of a 0.5B model makes about 250 kernel calls of 20 to 300 us each, so handing work to another core has
// to cost about a microsecond. The pool therefore works like this:
//
//   * A call publishes one job (function, context, number of chunks) and bumps `state`. Workers that are awake spin on
//     `state` and see it within ~100 ns. The caller takes chunks itself straight away.
//   * Chunks are claimed from one atomic counter, in order. Two cores reading neighbouring chunks stream through memory
//     together, and a core that the operating system takes away for a while simply claims fewer.
//   * A worker *joins* a job before it claims anything. The caller, once the chunks are gone, closes the job and waits
//   only
//     for the workers that joined: a worker that is still asleep or descheduled never delays anyone.
//   * After a job a worker spins for kSpinNanoseconds (longer than the Python between two kernels of a step, much
//     shorter than the pause between two requests) and then sleeps on a futex. An idle process uses no CPU.
//   * While the caller waits for a worker it spins, and yields when that takes long: the worker may need this very
//   core.
//
// `state` holds everything that must change together: | generation (32 bits) | open (1 bit) | joined (31 bits) |.
// The low word is the futex that sleepers wait on together with a separate counter of sleepers.
//
// The size of the pool is the number of CPUs in the affinity mask at the first call, or OMP_NUM_THREADS if that is
// smaller. Python reads the variable and passes it on: MindSpore sets OMP_NUM_THREADS=1 in the C environment when it is
// imported, so getenv() here would not see what the user said. Workers are detached threads: they end with the process.
// fork() copies only the calling thread, so the child forgets the pool (pthread_atfork) and builds its own at its first
// call.

#include "threads.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "memory.h"
#include "waiting.h"

namespace vllm_ms {
namespace {

constexpr long kSpinNanoseconds = 100 * 1000;
constexpr timespec kLongIdle = {2, 0};
constexpr size_t kKeptWhenIdle = size_t(64) << 20;
constexpr int kMaxThreads = 1024;
constexpr uint64_t kOpen = uint64_t{1} << 31;
constexpr uint64_t kJoined = kOpen - 1;

struct Pool {
  alignas(64) std::atomic<uint64_t> state{0};
  std::atomic<uint32_t> wake{0};  // the futex: bumped whenever a job is published
  std::atomic<int> sleepers{0};
  alignas(64) std::atomic<long> next{0};
  alignas(64) std::atomic<uint32_t> finished{0};
  alignas(64) void (*body)(void*, long, int) = nullptr;
  void* context = nullptr;
  long chunks = 0;
  int threads = 1;
};

struct Worker {
  Pool* pool;
  int index;
};

std::atomic<Pool*> active{nullptr};
std::atomic<bool> busy{false};
std::atomic<int> forced{0}, limit{0};

thread_local bool inside = false;  // a chunk

void take_chunks(Pool* pool, int thread) {
  inside = true;
  for (;;) {
    long chunk = pool->next.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= pool->chunks) break;
    pool->body(pool->context, chunk, thread);
  }
  inside = false;
}

// Waits for a generation other than `seen` that is open; returns it. Spins first, then sleeps; `tidies`: this worker is
// the one that trims memory if the sleep gets long.
uint32_t await_job(Pool* pool, uint32_t seen, bool tidies) {
  long deadline = now() + kSpinNanoseconds;
  for (int round = 0;; ++round) {
    uint64_t state = pool->state.load(std::memory_order_acquire);
    if ((state & kOpen) && uint32_t(state >> 32) != seen) return uint32_t(state >> 32);
    relax();
    if (round % 64 != 63 || now() < deadline) continue;
    uint32_t ticket = pool->wake.load(std::memory_order_seq_cst);
    pool->sleepers.fetch_add(1, std::memory_order_seq_cst);
    state = pool->state.load(std::memory_order_seq_cst);
    if (!((state & kOpen) && uint32_t(state >> 32) != seen)) {
      const timespec* patience = tidies ? &kLongIdle : nullptr;
      long slept = syscall(SYS_futex, &pool->wake, FUTEX_WAIT_PRIVATE, ticket, patience, nullptr, 0);
      if (slept != 0 && errno == ETIMEDOUT) {
        trim_recycled(kKeptWhenIdle);
        tidies = false;
      }
    }
    pool->sleepers.fetch_sub(1, std::memory_order_seq_cst);
    deadline = now() + kSpinNanoseconds;
  }
}

bool join(Pool* pool, uint32_t generation) {
  uint64_t state = pool->state.load(std::memory_order_acquire);
  while ((state & kOpen) && uint32_t(state >> 32) == generation) {
    if (pool->state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

void* work(void* argument) {
  Worker worker = *static_cast<Worker*>(argument);
  delete static_cast<Worker*>(argument);
  uint32_t seen = 0;
  for (;;) {
    seen = await_job(worker.pool, seen, worker.index == 1);
    if (!join(worker.pool, seen)) continue;
    take_chunks(worker.pool, worker.index);
    worker.pool->finished.fetch_add(1, std::memory_order_release);
  }
  return nullptr;
}

int wanted_threads() {
  if (int count = forced.load()) return count;
  cpu_set_t mask;
  int count = sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : int(sysconf(_SC_NPROCESSORS_ONLN));
  int most = limit.load();
  if (most > 0 && most < count) count = most;
  return count < 1 ? 1 : count > kMaxThreads ? kMaxThreads : count;
}

Pool* start_pool() {
  Pool* pool = new Pool;
  int wanted = wanted_threads();
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  for (int index = 1; index < wanted; ++index) {
    pthread_t thread;
    Worker* worker = new Worker{pool, index};
    if (pthread_create(&thread, &attributes, work, worker) != 0) {  // no more threads allowed: do with fewer
      delete worker;
      break;
    }
    ++pool->threads;
  }
  pthread_attr_destroy(&attributes);
  return pool;
}

void forget_pool() {  // in the child of a fork; the memory of the parent's pool is left alone, its threads are not here
  active.store(nullptr);
  busy.store(false);
}

// The pool, created at the first call. Only called while holding `busy`.
Pool* pool() {
  Pool* current = active.load(std::memory_order_acquire);
  if (current) return current;
  static bool registered = pthread_atfork(nullptr, nullptr, forget_pool) == 0;
  (void)registered;
  current = start_pool();
  active.store(current, std::memory_order_release);
  return current;
}

void publish(Pool* pool) {
  pool->next.store(0, std::memory_order_relaxed);
  pool->finished.store(0, std::memory_order_relaxed);
  uint64_t generation = (pool->state.load(std::memory_order_relaxed) >> 32) + 1;
  if ((generation & 0xffffffff) == 0) generation = 1;  // 0 is what a new worker has "seen"
  pool->state.store((generation << 32) | kOpen, std::memory_order_seq_cst);
  if (pool->sleepers.load(std::memory_order_seq_cst) == 0) return;
  pool->wake.fetch_add(1, std::memory_order_seq_cst);
  syscall(SYS_futex, &pool->wake, FUTEX_WAKE_PRIVATE, kMaxThreads, nullptr, nullptr, 0);
}

void close_and_wait(Pool* pool) {
  uint32_t joined = uint32_t(pool->state.fetch_and(~kOpen, std::memory_order_acq_rel) & kJoined);
  for (long round = 0; pool->finished.load(std::memory_order_acquire) != joined; ++round) {
    if (round < 4096) relax();
    else sched_yield();
  }
}

}  // namespace

void run_chunks(long chunks, void (*body)(void*, long, int), void* context) {
  if (chunks > 1 && !busy.exchange(true, std::memory_order_acquire)) {
    Pool* workers = pool();
    if (workers->threads > 1) {
      workers->body = body;
      workers->context = context;
      workers->chunks = chunks;
      publish(workers);
      take_chunks(workers, 0);
      close_and_wait(workers);
      busy.store(false, std::memory_order_release);
      return;
    }
    busy.store(false, std::memory_order_release);
  }
  for (long chunk = 0; chunk < chunks; ++chunk) body(context, chunk, 0);
}

int thread_count() {
  if (inside) return 1;
  Pool* current = active.load(std::memory_order_acquire);
  return current ? current->threads : wanted_threads();
}

void set_thread_limit(int count) { limit.store(count < 0 ? 0 : count); }

void set_thread_count(int count) {
  while (busy.exchange(true, std::memory_order_acquire)) sched_yield();
  forced.store(count < 0 ? 0 : count > kMaxThreads ? kMaxThreads : count);
  active.store(nullptr);  // the old workers sleep for good: rare (tests, start-up), and cheaper than ending them safely
  busy.store(false, std::memory_order_release);
}

namespace {

struct Buffers {
  void* data[int(Slot::kCount)] = {};
  size_t size[int(Slot::kCount)] = {};
  ~Buffers() {
    for (void* buffer : data) free(buffer);
  }
};

thread_local Buffers buffers;
thread_local char message[512];

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  int index = int(slot);
  if (buffers.size[index] >= bytes && buffers.data[index]) return buffers.data[index];
  size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
  free(buffers.data[index]);
  buffers.data[index] = aligned_alloc(64, size);
  buffers.size[index] = buffers.data[index] ? size : 0;
  return buffers.data[index];
}

const char* fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  return message;
}

}  // namespace vllm_ms
