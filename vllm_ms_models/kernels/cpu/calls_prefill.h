// Multi-head latent attention over keys and values that latents are expanded to. Used by module.cpp only.
//
// Attention over latents (attention_latent.h) multiplies 2 rank + rope numbers for each pair of a query and a position;
// over expanded keys and values it is nope + rope + values: 1088 against 320 with DeepSeek's sizes. Expanding a position
// costs rank * (nope + values), what absorbing costs a query. So for a prompt that is new it comes for nothing, and for
// one that continues a cached context it pays from some 170 tokens on.
//
// Threads share the heads. Each expands its head kExpandedRows positions at a time, which stay in L2 until they are
// written to a cache of this head alone, in the layout of kv_cache.cpp, and then is ordinary attention. Memory: the
// latents of a sequence, gathered once, and of each thread one head's keys and values of the sequence.
#pragma once

#include "calls_latent.h"
#include "sequences.h"

namespace vllm_ms {
namespace {

constexpr long kExpandedRows = 256;

struct Prefill {
  const Functions& functions;
  std::vector<const Packed*> keys, values;  // of each head
  AttentionCall call;                       // of all heads; out and query of the whole batch
  long rank, rope;
  // Of the sequence at work:
  long first, tokens, length;  // its rows of query; its positions
  const char *latents, *ropes;  // [length, rank] and [length, rope]
  const char* message;

  long size() const { return dtype_size(call.dtype); }
  long key_size() const { return keys[0]->out_features + rope; }
};

// The latents of a sequence in one piece; false: out of memory.
bool gather_latents(Prefill& all, long sequence) {
  const AttentionCall& call = all.call;
  const long size = all.size(), width = (all.rank + all.rope) * size, rank = all.rank * size, rope = all.rope * size;
  char* latents = static_cast<char*>(scratch(Slot::kLatents, size_t(all.length * width)));
  char* ropes = latents + all.length * rank;
  if (!latents) return false;
  const int32_t* table = call.block_tables + sequence * call.table_stride;
  for (long position = 0; position < all.length; ++position) {
    const long slot = table[position / call.block_size] * call.block_size + position % call.block_size;
    const char* from = static_cast<const char*>(call.cache) + slot * width;
    memcpy(latents + position * rank, from, size_t(rank));
    memcpy(ropes + position * rope, from + rank, size_t(rope));
  }
  all.latents = latents, all.ropes = ropes;
  return true;
}

const char* expand(const Prefill& all, const Packed& weight, long first, long rows, char* to) {
  LinearCall call = {};
  call.weight = &weight, call.x = all.latents + first * all.rank * all.size();
  call.x_dtype = call.out.dtype = all.call.dtype;
  call.rows = rows, call.gate = Gate::kNone;
  call.out.data[0] = to, call.out.stride[0] = all.key_size();
  return all.functions.linear(call);
}

// Keys and values of a head, as the cache of a model that has no other.
const char* expand_head(const Prefill& all, long head, char* cache, long room) {
  const long size = all.size(), row = all.key_size() * size, nope = all.keys[0]->out_features * size;
  char* rows = static_cast<char*>(scratch(Slot::kHeads, size_t(2 * kExpandedRows * row)));
  if (!rows) return "Out of memory for expanded keys and values.";
  char* values = rows + kExpandedRows * row;
  int64_t slots[kExpandedRows];
  for (long first = 0, count; first < all.length; first += count) {
    count = all.length - first < kExpandedRows ? all.length - first : kExpandedRows;
    const char* message = expand(all, *all.keys[size_t(head)], first, count, rows);
    if (!message) message = expand(all, *all.values[size_t(head)], first, count, values);
    if (message) return message;
    for (long i = 0; i < count; ++i) {
      memcpy(rows + i * row + nope, all.ropes + (first + i) * all.rope * size, size_t(all.rope * size));
      slots[i] = first + i;
    }
    const WriteCall write = {rows, values, cache, all.call.dtype, false, count, 1, all.key_size(), 1, room, slots};
    if ((message = all.functions.write_kv(write))) return message;
  }
  return nullptr;
}

const char* attend_head(const Prefill& all, long head) {
  const long size = all.size(), room = (all.length + 15) / 16 * 16, heads = long(all.keys.size());
  char* cache = static_cast<char*>(scratch(Slot::kExpanded, size_t(2 * room * all.key_size() * size)));
  if (!cache) return "Out of memory for expanded keys and values.";
  if (const char* message = expand_head(all, head, cache, room)) return message;
  const int32_t starts[] = {0, int32_t(all.tokens)}, length = int32_t(all.length), table = 0;
  AttentionCall call = all.call;
  const long at = all.first * heads + head;
  call.query = static_cast<const char*>(call.query) + at * all.key_size() * size;
  call.out = static_cast<char*>(call.out) + at * call.value_size * size;
  call.cache = cache, call.num_blocks = 1, call.block_size = room;
  call.tokens = all.tokens, call.heads = call.kv_heads = 1, call.head_size = all.key_size();
  call.query_start = starts, call.seq_lens = &length, call.block_tables = &table;
  call.sequences = call.table_stride = 1;
  return all.functions.attention(call);
}

const char* attend_sequences(Prefill& all) {
  const AttentionCall& call = all.call;
  for (long s = 0; s < call.sequences; ++s) {
    all.first = call.query_start[s], all.tokens = call.query_start[s + 1] - all.first, all.length = call.seq_lens[s];
    if (all.tokens == 0) continue;
    if (!gather_latents(all, s)) return "Out of memory for the latents of a sequence.";
    auto body = [](void* context, long head, int) {
      Prefill& shared = *static_cast<Prefill*>(context);
      if (const char* message = attend_head(shared, head)) __atomic_store_n(&shared.message, message, __ATOMIC_RELAXED);
    };
    run_chunks(long(all.keys.size()), body, &all);
    if (all.message) return all.message;
  }
  return nullptr;
}

// mla_prefill(query, cache, query_start, seq_lens, block_tables, keys, values, scale) -> tensor
PyObject* mla_prefill(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor query, cache;
  Prefill all = {functions(self), {}, {}, {}, 0, 0, 0, 0, 0, nullptr, nullptr, nullptr};
  AttentionCall& call = all.call;
  if (!expect(count, 8) || !read_activation(objects[0], "query", query, 2) ||
      !read_latents(objects[1], query.dtype, cache) || !read_sequences(objects + 2, call) ||
      !read_heads(objects[5], all.keys) || !read_heads(objects[6], all.values))
    return nullptr;
  unpack(objects[7], call.scale);
  if (PyErr_Occurred()) return nullptr;
  const long heads = long(all.keys.size());
  all.rank = all.keys[0]->in_features, all.rope = cache.shape[2] - all.rank;
  call.value_size = all.values[0]->out_features;
  if (all.rope < 0 || all.values[0]->in_features != all.rank || long(all.values.size()) != heads ||
      query.shape[1] != heads * all.key_size() || call.value_size > all.key_size())
    return PyErr_Format(PyExc_ValueError,
                        "A query of %ld features, %ld keys of %ld and %zd values of %ld features do not fit each "
                        "other and rows of %ld.",
                        long(query.shape[1]), heads, all.key_size(), Py_ssize_t(all.values.size()), call.value_size,
                        long(cache.shape[2]));
  call.query = query.data, call.cache = cache.data, call.dtype = query.dtype, call.tokens = query.shape[0];
  call.causal = true, call.num_blocks = cache.shape[0], call.block_size = cache.shape[1], call.row_heads = heads;
  if (const char* message = check_sequences(call)) return PyErr_Format(PyExc_ValueError, "%s", message);
  const int64_t shape[] = {call.tokens, heads * call.value_size};
  PyObject* tensor = make_tensor(call.dtype, 2, shape, &call.out);
  return fill(tensor, [&] { return attend_sequences(all); });
}

}  // namespace
}  // namespace vllm_ms
