// How processes of one host meet.
//
// Each has a line of control words and two areas in memory that all map. What it writes into one area others may read
// once they have met; by the time they have met again they have read it, so that the areas take turns, and a meeting is
// all the synchronization that a collective needs: one for a small sum.
//
// Meeting is publishing one's own step and waiting for the steps of the others. Who waits spins for a while, which
// costs less than a microsecond if they come at once, then sleeps on a futex; those who come wake it only if somebody
// sleeps. Where there are more ranks than CPUs, the one that is waited for may need this very CPU: it is yielded from
// the start.
//
// A sleeper wakes ten times a second to look after the others: a process that has ended (also one that nobody has
// waited for, which pidfds tell) or gave up never comes. There is no limit on how long a living one may take.

#include "ranks.h"

#include <linux/futex.h>
#include <linux/memfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>

#include "threads.h"
#include "waiting.h"

namespace vllm_ms {
namespace {

constexpr long kSpinNanoseconds = 100 * 1000;
constexpr int kYields = 20;
constexpr long kPidfdOpen = 434;  // on every machine
constexpr timespec kPatience = {0, 100 * 1000 * 1000};

}  // namespace

// Written by its rank alone, but for the sleepers.
struct Ranks::Line {
  alignas(128) std::atomic<uint32_t> arrived;  // its step; a futex
  std::atomic<uint32_t> gave_up;
  std::atomic<uint32_t> sleepers;  // that wait for `arrived`
  uint64_t call[2];                // of its step, by turns
};

const char* const Ranks::kInterrupted = "A signal has interrupted a collective.";

long Ranks::bytes(int size) { return size * (long(sizeof(Line)) + 2 * kCapacity); }

int Ranks::new_memory(int size) {
  const int memory = int(syscall(SYS_memfd_create, "vllm_ms_models", MFD_CLOEXEC));
  if (memory < 0 || ftruncate(memory, bytes(size)) == 0) return memory;
  close(memory);
  return -1;
}

Ranks::Descriptors::~Descriptors() {
  for (int descriptor : *this) close(descriptor);
}

Ranks::Ranks(const Setup& setup, bool (*interrupted)())
    : setup_(setup), interrupted_(interrupted), process_(getpid()) {
  static_assert(std::atomic<uint32_t>::is_always_lock_free && kCapacity % 4096 == 0);
  for (int process : setup.processes) {  // by their system calls: C libraries and Pythons may be too old to have them
    const int watched = int(syscall(kPidfdOpen, process, 0));
    if (watched < 0) throw std::system_error(errno, std::generic_category());
    watched_.push_back(watched);
  }
  void* start = mmap(nullptr, size_t(bytes(setup.size)), PROT_READ | PROT_WRITE, MAP_SHARED, setup.memory, 0);
  if (start == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  memory_ = static_cast<char*>(start);
}

Ranks::~Ranks() {
  if (process_ == getpid() && broken_.empty()) give_up("It was left.");  // the child of a fork is no rank
  munmap(memory_, size_t(bytes(setup_.size)));
}

char* Ranks::area(int other, uint32_t step) const { return memory_ + (2 * other + (step & 1)) * kCapacity; }

Ranks::Line& Ranks::line(int other) const {
  return reinterpret_cast<Line*>(memory_ + 2 * setup_.size * kCapacity)[other];
}

bool Ranks::is_here(const Line& line) const {
  return int32_t(line.arrived.load(std::memory_order_seq_cst) - step_) >= 0;
}

// Whether it comes soon.
bool Ranks::spin(const Line& line) const {
  if (setup_.crowded) {
    for (int round = 0; round < kYields; ++round) {
      if (is_here(line)) return true;
      sched_yield();
    }
    return is_here(line);
  }
  for (long round = 1, deadline = 0;; ++round) {
    if (is_here(line)) return true;
    relax();
    if (round % 64) continue;
    const long time = now();
    if (!deadline) deadline = time + kSpinNanoseconds;
    else if (time >= deadline) return false;
  }
}

// Until it comes, for a tenth of a second at most.
void Ranks::sleep(Line& line) const {
  line.sleepers.fetch_add(1, std::memory_order_seq_cst);
  const uint32_t seen = line.arrived.load(std::memory_order_seq_cst);
  if (int32_t(seen - step_) < 0 && !line.gave_up.load(std::memory_order_seq_cst))
    syscall(SYS_futex, &line.arrived, FUTEX_WAIT, seen, &kPatience, nullptr, 0);
  line.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

const char* Ranks::await(int other) {
  Line& other_line = line(other);
  if (spin(other_line)) return nullptr;
  for (;;) {
    sleep(other_line);
    if (is_here(other_line)) return nullptr;
    pollfd process = {watched_[size_t(other)], POLLIN, 0};
    const bool ended = poll(&process, 1, 0) > 0, gave_up = other_line.gave_up.load(std::memory_order_seq_cst);
    if (is_here(other_line)) return nullptr;  // its last deed
    if (ended || gave_up)
      return fail("Rank %d of the %s group has %s; see what it says above, and start the server again.", other,
                  setup_.name.c_str(), ended ? "ended" : "given up");
    if (interrupted_()) return kInterrupted;
  }
}

const char* Ranks::give_up(const char* message) {
  broken_ = message;
  Line& own = line(setup_.rank);
  own.gave_up.store(1, std::memory_order_seq_cst);
  syscall(SYS_futex, &own.arrived, FUTEX_WAKE, kMaxRanks, nullptr, nullptr, 0);
  return message;
}

const char* Ranks::meet(uint64_t call) {
  if (!broken_.empty()) return fail("The %s group cannot go on: %s", setup_.name.c_str(), broken_.c_str());
  Line& own = line(setup_.rank);
  own.call[step_ & 1] = call;
  own.arrived.store(step_, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst))
    syscall(SYS_futex, &own.arrived, FUTEX_WAKE, kMaxRanks, nullptr, nullptr, 0);
  for (int other = 0; other < setup_.size; ++other) {
    if (other == setup_.rank) continue;
    if (const char* message = await(other)) return give_up(message);
    if (line(other).call[step_ & 1] != call)
      return give_up(fail("Ranks %d and %d of the %s group are not at the same collective, or its tensors are not "
                          "equally large; every rank must call the same ones in the same order.",
                          setup_.rank, other, setup_.name.c_str()));
  }
  ++step_;
  return nullptr;
}

}  // namespace vllm_ms
