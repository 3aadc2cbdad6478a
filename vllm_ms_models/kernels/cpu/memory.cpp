// Memory of results, recycled exactly when nobody can see it any more.
//
// A step of a 0.5B model returns about 240 tensors. Each lies over a buffer (tensors.h), which MindSpore releases when
// the last tensor over it dies, be it the result itself, a view or slice of it, or a torch tensor or NumPy array
// made from any of them. Only then does the memory come back here, so recycling needs no guesses about reference counts
// and can never hand out bytes that something still sees.
//
// Free blocks lie in lists by size class (four classes per power of two, at most 19% waste), newest first: a step finds
// the same, cache-warm blocks as the step before and allocates nothing. A block describes its buffer too.
//
// How much is kept: blocks in use and free blocks together are at most `limit` bytes (768 MiB), unless what is in use
// is more by itself; the block that has been free for longest goes back to the system first. A layer's results for a
// prefill of 8192 tokens (80 to 150 MB each for models of 0.5 to 1.5B) thus serve the next layer, which saves zeroing
// fresh pages: as much time as the elementwise kernels need. When the process has been idle for two seconds a thread of
// the pool returns all but 64 MiB (threads.cpp); with a pool of one nobody is there to do it.
//
// Weights are zeroed by the kernel, untouched until a checkpoint fills them, in huge pages (fewer TLB misses when a step
// streams through all of them), and returned to the system at once. Large ones have a mapping of their own; others are
// cut one after another, page by page, from chunks of 512 MiB: a process may have 65,530 mappings, a mixture of experts
// has more weights. Only addresses are lost where a weight of a chunk is freed before its neighbours.
//
// Buffers may come back on any thread: a mutex guards the lists. They are never destroyed, because tensors may outlive
// static destructors.

#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>

#include "kernels.h"

namespace vllm_ms {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kChunk = size_t(512) << 20;
constexpr int kClasses = 4 * 64;

// Where small weights lie.
struct Chunk {
  char* start;
  size_t used;   // bytes that were given away, from the start
  long weights;  // that live
};

struct Block {
  Buffer buffer;  // first: that is what others see
  size_t capacity;
  bool mapped;
  Chunk* chunk;  // of a weight that has no mapping of its own
  int size_class;
  uint64_t freed;  // when, by the lists' clock
  Block *newer, *older;
};

struct Lists {
  std::mutex mutex;
  Block* newest[kClasses] = {};
  Block* oldest[kClasses] = {};
  size_t bytes = 0, in_use = 0, limit = size_t(768) << 20;
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

void link(Lists& all, Block* block) {
  block->freed = block->capacity > all.limit ? 0 : ++all.clock;  // one that can never stay goes first
  block->newer = nullptr;
  block->older = all.newest[block->size_class];
  (block->older ? block->older->newer : all.oldest[block->size_class]) = block;
  all.newest[block->size_class] = block;
  all.bytes += block->capacity;
}

struct Chunks {
  std::mutex mutex;
  Chunk* newest = nullptr;
};

Chunks& chunks() {
  static Chunks* all = new Chunks;
  return *all;
}

// A weight of a chunk is gone: its pages are zero again, and not resident.
void leave_chunk(Block* block) {
  madvise(block->buffer.data, block->capacity, MADV_DONTNEED);
  Chunks& all = chunks();
  std::lock_guard<std::mutex> guard(all.mutex);
  Chunk* chunk = block->chunk;
  if (--chunk->weights) return;
  chunk->used = 0;
  if (chunk == all.newest) return;
  munmap(chunk->start, kChunk);
  delete chunk;
}

void release(Block* block) {
  if (block->chunk) leave_chunk(block);
  else if (block->mapped) munmap(block->buffer.data, block->capacity);
  else free(block->buffer.data);
  delete block;
}

// Takes blocks out of the lists, those that have been free for longest first, until they hold at most `most` bytes.
// They are to be released without the mutex: unmapping takes long.
Block* evict(Lists& all, size_t most) {
  Block* victims = nullptr;
  while (all.bytes > most) {
    Block* victim = nullptr;
    for (Block* block : all.oldest)
      if (block && (!victim || block->freed < victim->freed)) victim = block;
    unlink(all, victim);
    victim->older = victims;
    victims = victim;
  }
  return victims;
}

void release_all(Block* blocks) {
  while (blocks) {
    Block* next = blocks->older;
    release(blocks);
    blocks = next;
  }
}

// The most that may wait beside what is in use.
size_t room(const Lists& all) { return all.limit > all.in_use ? all.limit - all.in_use : 0; }

// A free block of the class; if there is none, others make room for a new one.
Block* reuse(int size_class, size_t capacity) {
  Lists& all = lists();
  Block *block, *victims = nullptr;
  {
    std::lock_guard<std::mutex> guard(all.mutex);
    block = all.newest[size_class];
    if (block) unlink(all, block);
    all.in_use += capacity;
    if (!block) victims = evict(all, room(all));
  }
  release_all(victims);
  return block;
}

Block* allocate(size_t bytes) {
  size_t capacity;
  int size_class = class_of(bytes, &capacity);
  if (Block* block = reuse(size_class, capacity)) return block;
  size_t alignment = capacity >= kHugePage ? kHugePage : 64;
  void* data = aligned_alloc(alignment, (capacity + alignment - 1) / alignment * alignment);
  if (!data) {
    Lists& all = lists();
    std::lock_guard<std::mutex> guard(all.mutex);
    all.in_use -= capacity;
    return nullptr;
  }
  if (capacity >= kHugePage) madvise(data, capacity, MADV_HUGEPAGE);
  Block* block = new Block();
  block->buffer.data = data;
  block->capacity = capacity;
  block->size_class = size_class;
  return block;
}

// Zero pages of a mapping of its own, aligned to a huge page by trimming a larger one. Null if there are none left.
char* map_pages(size_t size) {
  char* start = static_cast<char*>(
      mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (start == MAP_FAILED) return nullptr;
  size_t head = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (head) munmap(start, head);
  munmap(start + head + size, kHugePage - head);
  madvise(start + head, size, MADV_HUGEPAGE);
  return start + head;
}

// The next `size` bytes of the newest chunk, or of a new one. Null if memory is exhausted.
char* cut(size_t size, Chunk*& chunk) {
  Chunks& all = chunks();
  std::lock_guard<std::mutex> guard(all.mutex);
  if (!all.newest || all.newest->used + size > kChunk) {
    char* start = map_pages(kChunk);
    if (!start) return nullptr;
    if (all.newest && !all.newest->weights) munmap(all.newest->start, kChunk), delete all.newest;
    all.newest = new Chunk{start, 0, 0};
  }
  chunk = all.newest;
  char* at = chunk->start + chunk->used;
  chunk->used += size;
  ++chunk->weights;
  return at;
}

// Memory of a weight, one byte more than asked for at least.
Block* map(size_t bytes) {
  static const size_t page = size_t(sysconf(_SC_PAGESIZE));
  size_t size = (bytes + page) / page * page;
  Chunk* chunk = nullptr;
  char* start = size >= kChunk / 8 ? map_pages(size) : cut(size, chunk);
  if (!start) return nullptr;
  Block* block = new Block();
  block->buffer.data = start;
  block->capacity = size;
  block->mapped = true;
  block->chunk = chunk;
  return block;
}

}  // namespace

Buffer* new_buffer(int dtype, int dimensions, const int64_t* shape, bool zeroed) {
  size_t bytes = size_t(dtype_size(dtype));
  for (int i = 0; i < dimensions; ++i) bytes *= size_t(shape[i]);
  Block* block = zeroed ? map(bytes) : allocate(bytes);
  if (!block) return nullptr;
  Buffer& buffer = block->buffer;
  buffer.dtype = dtype;
  buffer.dimensions = dimensions;
  buffer.bytes = bytes;
  ssize_t stride = dtype_size(dtype);
  for (int i = dimensions - 1; i >= 0; --i) {
    buffer.shape[i] = shape[i];
    buffer.strides[i] = stride;
    stride *= shape[i];
  }
  return &buffer;
}

void recycle(Buffer* buffer) {
  Block* block = reinterpret_cast<Block*>(buffer);
  if (block->mapped) return release(block);
  Lists& all = lists();
  Block* victims;
  {
    std::lock_guard<std::mutex> guard(all.mutex);
    all.in_use -= block->capacity;
    link(all, block);
    victims = evict(all, room(all));
  }
  release_all(victims);
}

size_t recycled_bytes() {
  Lists& all = lists();
  std::lock_guard<std::mutex> guard(all.mutex);
  return all.bytes;
}

void set_recycling_limit(size_t bytes) {
  Lists& all = lists();
  Block* victims;
  {
    std::lock_guard<std::mutex> guard(all.mutex);
    all.limit = bytes;
    victims = evict(all, room(all));
  }
  release_all(victims);
}

void trim_recycled(size_t bytes) {
  Lists& all = lists();
  Block* victims;
  {
    std::lock_guard<std::mutex> guard(all.mutex);
    victims = evict(all, bytes);
  }
  release_all(victims);
}

}  // namespace vllm_ms
