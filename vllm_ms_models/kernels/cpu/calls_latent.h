// Multi-head latent attention for Python: products in which every head has a matrix of its own, and the cache that all
// heads share (attention_latent.h). Used by module.cpp only.
//
// Of the products, a head is an ordinary one (gemm.cpp), whose loops then run on one thread: the heads are what the threads share.
// One row is multiplied where it is; of several, a head's features are first gathered, a few percent of the product.
#pragma once

#include <cstring>
#include <vector>

#include "calls.h"
#include "threads.h"

namespace vllm_ms {
namespace {

struct Heads {
  const Functions& functions;
  const std::vector<const Packed*>& weights;
  const Tensor& x;
  char* out;
  long taken, given, passed;  // features of a head: multiplied, their results, copied
  const char* message;
};

const char* multiply_head(const Heads& heads, long head) {
  const long size = dtype_size(heads.x.dtype), rows = heads.x.shape[0], count = long(heads.weights.size());
  const long from = (heads.taken + heads.passed) * size, to = (heads.given + heads.passed) * size;
  const char* x = static_cast<const char*>(heads.x.data) + head * from;
  char* out = heads.out + head * to;
  LinearCall call = {};
  call.weight = heads.weights[size_t(head)], call.x = x, call.x_dtype = call.out.dtype = heads.x.dtype;
  call.rows = rows, call.gate = Gate::kNone;
  call.out.data[0] = out, call.out.stride[0] = count * (heads.given + heads.passed);
  for (long row = 0; heads.passed && row < rows; ++row)
    memcpy(out + row * count * to + heads.given * size, x + row * count * from + heads.taken * size,
           size_t(heads.passed * size));
  if (rows > 1) {
    char* gathered = static_cast<char*>(scratch(Slot::kHeads, size_t(rows * heads.taken * size)));
    if (!gathered) return "Out of memory for the features of a head.";
    for (long row = 0; row < rows; ++row)
      memcpy(gathered + row * heads.taken * size, x + row * count * from, size_t(heads.taken * size));
    call.x = gathered;
  }
  return heads.functions.linear(call);
}

// Weights of one shape in floats, one for each head.
bool read_heads(PyObject* object, std::vector<const Packed*>& to) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) == 0)
    return PyErr_Format(PyExc_ValueError, "The weights of heads come in a tuple, one for each."), false;
  to.resize(size_t(PyTuple_GET_SIZE(object)));
  for (size_t h = 0; h < to.size(); ++h) {
    if (!read_weight(PyTuple_GET_ITEM(object, Py_ssize_t(h)), to[h]) || !expect_floats(*to[h])) return false;
    if (to[h]->parts == 1 && to[h]->in_features == to[0]->in_features && to[h]->out_features == to[0]->out_features)
      continue;
    return PyErr_Format(PyExc_ValueError, "The weight of head %zd has not the shape of the first one.",
                        Py_ssize_t(h)), false;
  }
  return true;
}

// linear_heads(x, tuple of weights of one shape, features to pass) -> tensor [rows, heads * (out + passed)]
PyObject* linear_heads(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x;
  long passed;
  if (!expect(count, 3) || !read_activation(objects[0], "x", x, 2)) return nullptr;
  unpack(objects[2], passed);
  if (PyErr_Occurred()) return nullptr;
  std::vector<const Packed*> weights;
  if (!read_heads(objects[1], weights)) return nullptr;
  const long taken = weights[0]->in_features, given = weights[0]->out_features;
  if (passed < 0 || x.shape[1] != long(weights.size()) * (taken + passed))
    return PyErr_Format(PyExc_ValueError, "x has %ld features; %zd heads of %ld are expected.", long(x.shape[1]),
                        Py_ssize_t(weights.size()), taken + passed);
  const int64_t shape[] = {x.shape[0], int64_t(weights.size()) * (given + passed)};
  void* out = nullptr;
  PyObject* tensor = make_tensor(x.dtype, 2, shape, &out);
  Heads heads = {functions(self), weights, x, static_cast<char*>(out), taken, given, passed, nullptr};
  return fill(tensor, [&]() -> const char* {
    if (x.shape[0] == 0) return nullptr;
    auto body = [](void* context, long head, int) {
      Heads& all = *static_cast<Heads*>(context);
      if (const char* message = multiply_head(all, head)) __atomic_store_n(&all.message, message, __ATOMIC_RELAXED);
    };
    run_chunks(long(weights.size()), body, &heads);
    return heads.message;
  });
}

// The cache of one layer, [blocks, block_size, width].
bool read_latents(PyObject* object, int dtype, Tensor& cache) {
  static const int64_t kShape[] = {kAny, kAny, kAny};
  if (!read_as(object, "cache", dtype, 3, kShape, cache)) return false;
  if (cache.shape[1] > 0 && cache.shape[1] % 16 == 0 && cache.shape[2] > 0) return true;
  PyErr_Format(PyExc_ValueError, "The cache has blocks of %ld positions of %ld values; a multiple of 16 is expected.",
               long(cache.shape[1]), long(cache.shape[2]));
  return false;
}

// write_latent(latent, key, cache, slots): rows are copied as they are; a few KB each step, on this thread
PyObject* write_latent(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Tensor latent, key, cache, slots;
  if (!expect(count, 4) || !read_activation(objects[0], "latent", latent, 2) ||
      !read_as(objects[1], "key", latent.dtype, {latent.shape[0], kAny}, key) ||
      !read_latents(objects[2], latent.dtype, cache) ||
      !read_as(objects[3], "slots", kInt64, {latent.shape[0]}, slots))
    return nullptr;
  const long width = cache.shape[2], room = cache.shape[0] * cache.shape[1], size = dtype_size(latent.dtype);
  if (latent.shape[1] + key.shape[1] != width)
    return PyErr_Format(PyExc_ValueError, "latent and key have %ld and %ld features; the cache has rows of %ld.",
                        long(latent.shape[1]), long(key.shape[1]), width);
  const int64_t* slot = static_cast<const int64_t*>(slots.data);
  const size_t first = size_t(latent.shape[1] * size), second = size_t(key.shape[1] * size);
  for (long token = 0; token < latent.shape[0]; ++token)
    if (slot[token] >= room)
      return PyErr_Format(PyExc_ValueError, "write_latent: slot %ld of token %ld is outside of the cache's %ld slots.",
                          long(slot[token]), token, room);
  for (long token = 0; token < latent.shape[0]; ++token) {
    if (slot[token] < 0) continue;
    char* to = static_cast<char*>(cache.data) + size_t(slot[token]) * (first + second);
    memcpy(to, static_cast<const char*>(latent.data) + size_t(token) * first, first);
    memcpy(to + first, static_cast<const char*>(key.data) + size_t(token) * second, second);
  }
  Py_RETURN_NONE;
}

// mla_attention(query, cache, query_start, seq_lens, block_tables, scale, value_size) -> tensor
PyObject* mla_attention(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor query, cache;
  AttentionCall call = {};
  if (!expect(count, 7) || !read_activation(objects[0], "query", query, 2) ||
      !read_latents(objects[1], query.dtype, cache) || !read_sequences(objects + 2, call))
    return nullptr;
  unpack(objects[5], call.scale), unpack(objects[6], call.value_size);
  if (PyErr_Occurred()) return nullptr;
  const long width = cache.shape[2];
  if (query.shape[1] == 0 || query.shape[1] % width || call.value_size <= 0 || call.value_size > width)
    return PyErr_Format(PyExc_ValueError, "A query of %ld features and values of %ld do not fit rows of %ld.",
                        long(query.shape[1]), call.value_size, width);
  call.query = query.data, call.cache = cache.data, call.dtype = query.dtype, call.tokens = query.shape[0];
  call.latent = call.causal = true, call.num_blocks = cache.shape[0], call.block_size = cache.shape[1];
  call.kv_heads = 1, call.head_size = width, call.heads = call.row_heads = query.shape[1] / width;
  const int64_t shape[] = {call.tokens, call.heads * call.value_size};
  PyObject* tensor = make_tensor(call.dtype, 2, shape, &call.out);
  return fill(tensor, [&] { return functions(self).attention(call); });
}

}  // namespace
}  // namespace vllm_ms
