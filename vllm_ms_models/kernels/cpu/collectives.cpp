// Collectives through shared memory (ranks.cpp), in pieces that fit into a rank's area.
//
// Between two meetings each rank writes piece i and reads what others wrote of piece i - 1: one meeting for each piece.
//
// A small sum is one piece: every rank writes all of its values, they meet, every rank adds all of them. A large one
// would read `size` times as much as it has, so that each rank adds one part of the values and hands it on: of three
// pieces in turn, it writes the parts of others, adds its own part, and reads the parts that others have added. Values
// are added in the order of ranks either way, by one function: all ranks get the same bits.

#include "collectives.h"

#include <cstring>

#include "threads.h"

namespace vllm_ms {
namespace collectives {
namespace {

constexpr long kCapacity = Ranks::kCapacity;
constexpr long kSmall = 32 << 10;  // bytes of a sum that every rank adds by itself

enum Kind { kSum = 1, kPartialSum, kScatter, kGather, kExchange, kBroadcast, kBarrier };

uint64_t call_of(Kind kind, long bytes) { return uint64_t(bytes) << 3 | kind; }

long min(long a, long b) { return a < b ? a : b; }

// On several threads, if it is worth handing over.
void copy(void* to, const void* from, long bytes) {
  struct Copy {
    char* to;
    const char* from;
    long bytes, pieces;
  } all = {static_cast<char*>(to), static_cast<const char*>(from), bytes, min(bytes / (64 << 10), 4 * thread_count())};
  if (all.pieces <= 1 || thread_count() == 1) {
    if (bytes > 0) memcpy(to, from, size_t(bytes));
    return;
  }
  auto body = [](void* context, long piece, int) {
    const Copy& copy = *static_cast<const Copy*>(context);
    const long begin = copy.bytes * piece / copy.pieces, end = copy.bytes * (piece + 1) / copy.pieces;
    memcpy(copy.to + begin, copy.from + begin, size_t(end - begin));
  };
  run_chunks(all.pieces, body, &all);
}

// write(begin, end) and read(begin, end) for each piece of [0, total), at most `capacity` long.
template <class Write, class Read>
const char* in_pieces(Ranks& ranks, Kind kind, long total, long capacity, const Write& write, const Read& read) {
  for (long begin = 0; begin < total; begin += capacity) {
    write(begin, min(begin + capacity, total));
    if (begin) read(begin - capacity, begin);
    if (const char* message = ranks.meet(call_of(kind, total))) return message;
  }
  if (total) read((total - 1) / capacity * capacity, total);
  return nullptr;
}

const char* sum_small(Ranks& ranks, AddParts add, char* x, int dtype, long items) {
  const long bytes = items * dtype_size(dtype);
  copy(ranks.mine(), x, bytes);
  if (const char* message = ranks.meet(call_of(kSum, bytes))) return message;
  const void* parts[kMaxRanks];
  for (int r = 0; r < ranks.size(); ++r) parts[r] = r == ranks.rank() ? x : ranks.theirs(r);
  add(parts, ranks.size(), x, dtype, items);
  return nullptr;
}

// A sum in pieces, each of one part for each rank. Where a rank's area would have its own part is the sum of that part
// of the piece before.
struct LargeSum {
  Ranks& ranks;
  AddParts add;
  char* x;
  int dtype;
  long bytes;
  long most;  // bytes of a part, a multiple of cache lines

  long pieces() const { return (bytes + most * ranks.size() - 1) / (most * ranks.size()); }

  // Bytes of a part, and where it begins.
  long part(long piece, int rank, long& begin) const {
    const long start = piece * most * ranks.size(), length = min(bytes - start, most * ranks.size());
    const long share = ((length + ranks.size() - 1) / ranks.size() + 63) / 64 * 64, offset = min(rank * share, length);
    begin = start + offset;
    return min(share, length - offset);
  }

  void write_others(long piece) const {
    for (int r = 0; r < ranks.size(); ++r) {
      long begin, length = part(piece, r, begin);
      if (r != ranks.rank()) copy(ranks.mine() + r * most, x + begin, length);
    }
  }

  void add_mine(long piece) const {
    const long offset = ranks.rank() * most;
    long begin, length = part(piece, ranks.rank(), begin);
    const void* parts[kMaxRanks];
    for (int r = 0; r < ranks.size(); ++r) parts[r] = r == ranks.rank() ? x + begin : ranks.theirs(r) + offset;
    add(parts, ranks.size(), x + begin, dtype, length / dtype_size(dtype));
    copy(ranks.mine() + offset, x + begin, length);
  }

  void read_others(long piece) const {
    for (int r = 0; r < ranks.size(); ++r) {
      long begin, length = part(piece, r, begin);
      if (r != ranks.rank()) copy(x + begin, ranks.theirs(r) + r * most, length);
    }
  }

  const char* run() const {
    const long count = pieces();
    for (long step = 0;; ++step) {
      if (step < count) write_others(step);
      if (step >= 1 && step - 1 < count) add_mine(step - 1);
      if (step >= 2) read_others(step - 2);
      if (step == count + 1) return nullptr;
      if (const char* message = ranks.meet(call_of(kPartialSum, bytes))) return message;
    }
  }
};

long part_capacity(const Ranks& ranks) { return kCapacity / ranks.size() / 64 * 64; }

}  // namespace

const char* all_reduce(Ranks& ranks, AddParts add, void* x, int dtype, long items) {
  const long bytes = items * dtype_size(dtype);
  if (bytes == 0) return nullptr;
  if (bytes <= kSmall) return sum_small(ranks, add, static_cast<char*>(x), dtype, items);
  return LargeSum{ranks, add, static_cast<char*>(x), dtype, bytes, part_capacity(ranks)}.run();
}

const char* reduce_scatter(Ranks& ranks, AddParts add, const void* x, void* out, int dtype, long items) {
  const long bytes = items * dtype_size(dtype), capacity = part_capacity(ranks);
  const char* from = static_cast<const char*>(x);
  auto write = [&](long begin, long end) {
    for (int r = 0; r < ranks.size(); ++r)
      if (r != ranks.rank()) copy(ranks.mine() + r * capacity, from + r * bytes + begin, end - begin);
  };
  auto read = [&](long begin, long end) {
    const void* parts[kMaxRanks];
    for (int r = 0; r < ranks.size(); ++r)
      parts[r] = r == ranks.rank() ? from + r * bytes + begin : ranks.theirs(r) + ranks.rank() * capacity;
    add(parts, ranks.size(), static_cast<char*>(out) + begin, dtype, (end - begin) / dtype_size(dtype));
  };
  return in_pieces(ranks, kScatter, bytes, capacity, write, read);
}

const char* all_gather(Ranks& ranks, const void* x, void* out, long rows, long bytes) {
  // Bytes [begin, end) of [rows, bytes] to where rank r's are in the result.
  auto place = [&](int r, const char* from, long begin, long end) {
    while (begin < end) {
      const long row = begin / bytes, column = begin % bytes, count = min(bytes - column, end - begin);
      copy(static_cast<char*>(out) + (row * ranks.size() + r) * bytes + column, from, count);
      from += count, begin += count;
    }
  };
  auto write = [&](long begin, long end) { copy(ranks.mine(), static_cast<const char*>(x) + begin, end - begin); };
  auto read = [&](long begin, long end) {
    for (int r = 0; r < ranks.size(); ++r)
      place(r, r == ranks.rank() ? static_cast<const char*>(x) + begin : ranks.theirs(r), begin, end);
  };
  return in_pieces(ranks, kGather, rows * bytes, kCapacity, write, read);
}

const char* all_to_all(Ranks& ranks, const void* x, void* out, long bytes) {
  const long capacity = part_capacity(ranks);
  auto from = [&](int r) { return static_cast<const char*>(x) + r * bytes; };
  auto write = [&](long begin, long end) {
    for (int r = 0; r < ranks.size(); ++r)
      if (r != ranks.rank()) copy(ranks.mine() + r * capacity, from(r) + begin, end - begin);
  };
  auto read = [&](long begin, long end) {
    for (int r = 0; r < ranks.size(); ++r)
      copy(static_cast<char*>(out) + r * bytes + begin,
           r == ranks.rank() ? from(r) + begin : ranks.theirs(r) + ranks.rank() * capacity, end - begin);
  };
  return in_pieces(ranks, kExchange, bytes, capacity, write, read);
}

const char* broadcast(Ranks& ranks, int source, void* x, long bytes) {
  char* values = static_cast<char*>(x);
  auto write = [&](long begin, long end) {
    if (ranks.rank() == source) copy(ranks.mine(), values + begin, end - begin);
  };
  auto read = [&](long begin, long end) {
    if (ranks.rank() != source) copy(values + begin, ranks.theirs(source), end - begin);
  };
  return in_pieces(ranks, kBroadcast, bytes, kCapacity, write, read);
}

const char* barrier(Ranks& ranks) { return ranks.meet(call_of(kBarrier, 0)); }

}  // namespace collectives
}  // namespace vllm_ms
