// Products in which every head has a matrix of its own, for Python. Used by module.cpp only.
//
// A head is an ordinary product (gemm.cpp), whose loops then run on one thread: the heads are what the threads share.
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

// linear_heads(x, tuple of weights of one shape, features to pass) -> tensor [rows, heads * (out + passed)]
PyObject* linear_heads(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x;
  long passed;
  if (!expect(count, 3) || !read_activation(objects[0], "x", x, 2)) return nullptr;
  unpack(objects[2], passed);
  if (PyErr_Occurred()) return nullptr;
  if (!PyTuple_Check(objects[1]) || PyTuple_GET_SIZE(objects[1]) == 0)
    return PyErr_Format(PyExc_ValueError, "The weights of heads come in a tuple, one for each.");
  std::vector<const Packed*> weights(size_t(PyTuple_GET_SIZE(objects[1])));
  for (size_t h = 0; h < weights.size(); ++h) {
    if (!read_weight(PyTuple_GET_ITEM(objects[1], Py_ssize_t(h)), weights[h]) || !expect_floats(*weights[h]))
      return nullptr;
    if (weights[h]->parts != 1 || weights[h]->in_features != weights[0]->in_features ||
        weights[h]->out_features != weights[0]->out_features)
      return PyErr_Format(PyExc_ValueError, "The weight of head %zd has not the shape of the first one.",
                          Py_ssize_t(h));
  }
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

}  // namespace
}  // namespace vllm_ms
