// Memory of results, recycled exactly when nobody can see it any more.
//
// A step of a 0.5B model returns about 260 tensors. Results reach MindSpore through DLPack: `DLManagedTensor` carries a
// deleter, which MindSpore calls when the last tensor over the memory dies, be it the result itself, a view or slice of
// it, or a torch tensor made from any of them. Only then does the memory come back here, so recycling needs no guesses
// about reference counts and can never hand out bytes that something still sees. Importing one costs about 1.5 us in
// bfloat16 too (a bfloat16 tensor by way of NumPy and `view` costs 8).
//
// Free blocks lie in lists by size class (four classes per power of two, at most 19% waste), newest first: a step finds
// the same, cache-warm blocks as the step before and allocates nothing. The lists hold at most `limit` bytes (256 MiB);
// beyond it the block that has been free for longest goes back to the system. A block holds its DLPack descriptor too.
//
// Weights are mapped directly: zeroed by the kernel, untouched until a checkpoint fills them, aligned to huge pages
// (fewer TLB misses when a step streams through all of them), and returned to the system at once.
//
// The deleter may run on any thread, without the GIL: a mutex guards the lists. They are never destroyed, because
// tensors may outlive static destructors.

#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>

#include "kernels.h"

namespace vllm_ms {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr int kClasses = 4 * 64;

struct Block {
  DLManagedTensor managed;  // first: the deleter gets its address
  int64_t shape[kMaxDimensions], strides[kMaxDimensions];
  void* data;
  size_t capacity;
  bool mapped;
  int size_class;
  uint64_t freed;  // when, by the lists' clock
  Block *newer, *older;
};

struct Lists {
  std::mutex mutex;
  Block* newest[kClasses] = {};
  Block* oldest[kClasses] = {};
  size_t bytes = 0, limit = size_t(256) << 20;
  uint64_t clock = 0;
};

Lists& lists() {
  static Lists* all = new Lists;
  return *all;
}

// Smallest class whose blocks hold `bytes`, and their size: 4, 5, 6 or 7 quarters of a power of two.
int class_of(size_t bytes, size_t* capacity) {
  if (bytes < 256) bytes = 256;
  int log = 63 - __builtin_clzl(bytes);
  size_t quarter = size_t(1) << (log - 2), steps = (bytes + quarter - 1) / quarter;  // 4 to 8
  *capacity = steps * quarter;
  return steps == 8 ? 4 * (log + 1) : 4 * log + int(steps) - 4;
}

void unlink(Lists& all, Block* block) {
  (block->newer ? block->newer->older : all.newest[block->size_class]) = block->older;
  (block->older ? block->older->newer : all.oldest[block->size_class]) = block->newer;
  all.bytes -= block->capacity;
}

void release(Block* block) {
  if (block->mapped) munmap(block->data, block->capacity);
  else free(block->data);
  delete block;
}

// Takes the block that has been free for longest out of the lists.
Block* evict(Lists& all) {
  Block* victim = nullptr;
  for (Block* block : all.oldest)
    if (block && (!victim || block->freed < victim->freed)) victim = block;
  if (victim) unlink(all, victim);
  return victim;
}

void recycle(DLManagedTensor* managed) {
  Block* block = reinterpret_cast<Block*>(managed);
  if (block->mapped) return release(block);
  Lists& all = lists();
  std::lock_guard<std::mutex> guard(all.mutex);
  if (block->capacity > all.limit) return release(block);
  while (all.bytes + block->capacity > all.limit) release(evict(all));
  block->freed = ++all.clock;
  block->newer = nullptr;
  block->older = all.newest[block->size_class];
  (block->older ? block->older->newer : all.oldest[block->size_class]) = block;
  all.newest[block->size_class] = block;
  all.bytes += block->capacity;
}

Block* reuse(int size_class) {
  Lists& all = lists();
  std::lock_guard<std::mutex> guard(all.mutex);
  Block* block = all.newest[size_class];
  if (block) unlink(all, block);
  return block;
}

Block* allocate(size_t bytes) {
  size_t capacity;
  int size_class = class_of(bytes, &capacity);
  if (Block* block = reuse(size_class)) return block;
  size_t alignment = capacity >= kHugePage ? kHugePage : 64;
  void* data = aligned_alloc(alignment, (capacity + alignment - 1) / alignment * alignment);
  if (!data) return nullptr;
  if (capacity >= kHugePage) madvise(data, capacity, MADV_HUGEPAGE);
  Block* block = new Block();
  block->data = data;
  block->capacity = capacity;
  block->size_class = size_class;
  return block;
}

// Zero pages of a mapping of its own; the start is aligned to a huge page by trimming a larger mapping.
Block* map(size_t bytes) {
  size_t size = (bytes + 4096) / 4096 * 4096, slack = size >= kHugePage ? kHugePage : 0;
  char* start = static_cast<char*>(
      mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (start == MAP_FAILED) return nullptr;
  if (slack) {
    size_t head = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
    if (head) munmap(start, head);
    if (slack - head) munmap(start + head + size, slack - head);
    start += head;
    madvise(start, size, MADV_HUGEPAGE);
  }
  Block* block = new Block();
  block->data = start;
  block->capacity = size;
  block->mapped = true;
  return block;
}

}  // namespace

DLManagedTensor* new_tensor(int dtype, int dimensions, const int64_t* shape, bool zeroed) {
  static const uint8_t kCodes[] = {2, 4, 2, 0, 0};  // DLPack's float, bfloat, float, int, int
  size_t bytes = size_t(dtype_size(dtype));
  for (int i = 0; i < dimensions; ++i) bytes *= size_t(shape[i]);
  Block* block = zeroed ? map(bytes) : allocate(bytes);
  if (!block) return nullptr;
  int64_t stride = 1;
  for (int i = dimensions - 1; i >= 0; --i) {
    block->shape[i] = shape[i];
    block->strides[i] = stride;
    stride *= shape[i];
  }
  block->managed.tensor = {
      block->data, 1, 0, dimensions, kCodes[dtype], uint8_t(8 * dtype_size(dtype)), 1, block->shape, block->strides, 0};
  block->managed.context = nullptr;
  block->managed.deleter = recycle;
  return &block->managed;
}

size_t recycled_bytes() {
  Lists& all = lists();
  std::lock_guard<std::mutex> guard(all.mutex);
  return all.bytes;
}

void set_recycling_limit(size_t bytes) {
  Lists& all = lists();
  std::lock_guard<std::mutex> guard(all.mutex);
  all.limit = bytes;
  while (all.bytes > all.limit) release(evict(all));
}

}  // namespace vllm_ms
