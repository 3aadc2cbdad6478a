// Processes of one host that share memory: where each writes for the others, and how they wait; ranks.cpp explains it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vllm_ms {

constexpr int kMaxRanks = 256;

class Ranks {
 public:
  // How the processes are found, and what they are called in a sentence.
  struct Setup {
    int memory;                  // descriptor of `bytes(size)` bytes of memory that all of them map, zeros at first
    int rank, size;              // this process's number, and how many there are
    std::vector<int> processes;  // their numbers, by rank
    bool crowded;                // there are more of them than CPUs
    std::string name;
  };

  static long bytes(int size);
  static constexpr long kCapacity = 512 << 10;  // bytes that a rank can write before they meet

  // A descriptor of such memory, which has no name. -1 and errno if there is none.
  static int new_memory(int size);

  // Throws std::system_error if the memory cannot be mapped or a process not be watched. `interrupted` is asked while
  // others let one wait.
  Ranks(const Setup& setup, bool (*interrupted)());
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int rank() const { return setup_.rank; }
  int size() const { return setup_.size; }

  // Where this rank writes until they meet next; what rank `other` wrote before they met last. Both are good until they
  // meet the next time.
  char* mine() const { return area(setup_.rank, step_); }
  const char* theirs(int other) const { return area(other, step_ - 1); }

  // Returns null once all have called it, or a sentence for RuntimeError: a process has ended, gave up, or is at
  // another `call`, a number that says what they are doing. After that, there is no next time. `kInterrupted`:
  // `interrupted` said so.
  const char* meet(uint64_t call);
  static const char* const kInterrupted;

 private:
  struct Line;
  Line& line(int other) const;
  char* area(int other, uint32_t step) const;
  bool is_here(const Line& line) const;
  bool spin(const Line& line) const;
  void sleep(Line& line) const;
  const char* await(int other);
  const char* give_up(const char* message);

  struct Descriptors : std::vector<int> {
    ~Descriptors();
  };

  Setup setup_;
  Descriptors watched_;  // the processes (pidfd_open), by rank
  bool (*interrupted_)();
  int process_;
  char* memory_;
  uint32_t step_ = 1;
  std::string broken_;
};

}  // namespace vllm_ms
