// The functions that Python calls: one for each kernel, bound to the kernels of one instruction set (`self`). Used by
// module.cpp only.
//
// Each reads its arguments, raises ValueError if they do not fit one another, makes the tensors that it returns (0.6 us
// each: tensors.h), and runs the kernel without the GIL.
#pragma once

#include "binding.h"
#include "calls_low_rank.h"
#include "tensors.h"

namespace vllm_ms {
namespace {

// --- weights --------------------------------------------------------------------------------------------------------

// The weight behind a Python `PackedWeight`.
bool read_weight(PyObject* object, const Packed*& to) {
  static PyObject* handle_name = PyUnicode_InternFromString("handle");
  PyObject* handle = PyObject_GetAttr(object, handle_name);
  if (!handle) {
    PyErr_Format(PyExc_ValueError, "The weight is a %s; the C++ kernels multiply their own `new_weight` only.",
                 Py_TYPE(object)->tp_name);
    return false;
  }
  to = static_cast<const Packed*>(PyLong_AsVoidPtr(handle));
  Py_DECREF(handle);
  return !PyErr_Occurred();
}

bool expect_floats(const Packed& weight) {
  if (weight.bits) PyErr_SetString(PyExc_ValueError, "The weight is one of integers; one of floats is expected.");
  return !weight.bits;
}

// load_rows(weight, part, first_row, address of the source, dtype, rows, stride)
PyObject* load_rows(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const Packed* weight;
  const void* source;
  int part, dtype;
  long first_row, rows, stride;
  if (!expect(count, 7) || !read_weight(objects[0], weight)) return nullptr;
  unpack(objects[1], part), unpack(objects[2], first_row), unpack(objects[3], source), unpack(objects[4], dtype);
  unpack(objects[5], rows), unpack(objects[6], stride);
  if (PyErr_Occurred() || !expect_floats(*weight)) return nullptr;
  const char* message;
  Py_BEGIN_ALLOW_THREADS message =
      functions(self).pack_rows(*weight, part, first_row, source, dtype, rows, stride);
  Py_END_ALLOW_THREADS return result(message);
}

// embedding(ids, weight, first_row) -> tensor
PyObject* embedding(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const Packed* weight;
  Tensor ids;
  long first_row;
  if (!expect(count, 3) || !read_weight(objects[1], weight) || !expect_floats(*weight)) return nullptr;
  if (!read(objects[0], "ids", ids, "int32 or int64", [](int code) { return code == kInt32 || code == kInt64; }))
    return nullptr;
  unpack(objects[2], first_row);
  if (PyErr_Occurred()) return nullptr;
  if (ids.dimensions != 1) return PyErr_Format(PyExc_ValueError, "ids has %d axes; 1 is expected.", ids.dimensions);
  const int64_t shape[] = {ids.shape[0], weight->in_features};
  void* out = nullptr;
  PyObject* tensor = make_tensor(weight->dtype, 2, shape, &out);
  return fill(tensor, [&] {
    return functions(self).embedding(*weight, ids.data, ids.dtype == kInt64, ids.shape[0], first_row, out);
  });
}

// --- products -------------------------------------------------------------------------------------------------------

// x, weight, bias or None
bool read_linear(LinearCall& call, PyObject* const* objects) {
  Tensor x, bias;
  if (!read_activation(objects[0], "x", x, 2) || !read_weight(objects[1], call.weight))
    return false;
  const Packed& weight = *call.weight;
  if (x.shape[1] != weight.in_features)
    return PyErr_Format(PyExc_ValueError, "x has %ld features; the weight has %ld inputs.", long(x.shape[1]),
                        weight.in_features),
           false;
  bias.data = nullptr;
  if (objects[2] != Py_None && !read_as(objects[2], "bias", kFloat32, {weight.out_features}, bias)) return false;
  call.x = x.data, call.x_dtype = call.out.dtype = x.dtype, call.rows = x.shape[0];
  call.gate = Gate::kNone;
  call.bias = static_cast<const float*>(bias.data);
  return true;
}

// linear(x, weight, bias or None, dtype of the result or None, addend or None) -> tensor [rows, out_features]
PyObject* linear(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  LinearCall call;
  Added added;
  if (!expect(count, 5) || !read_linear(call, objects) || !read_addend(objects[4], added, call)) return nullptr;
  if (objects[3] != Py_None) call.out.dtype = code_of(objects[3]);
  if (call.out.dtype < 0 || call.out.dtype > kFloat16)
    return PyErr_Format(PyExc_ValueError,
                        "A result cannot have dtype %S; float32, bfloat16 and float16 are supported.", objects[3]);
  const Packed& weight = *call.weight;
  const int64_t shape[] = {call.rows, weight.out_features};
  void* out = nullptr;
  PyObject* tensor = make_tensor(call.out.dtype, 2, shape, &out);
  for (int i = 0; tensor && i < weight.parts; ++i) {
    call.out.data[i] = static_cast<char*>(out) + weight.first_row[i] * dtype_size(call.out.dtype);
    call.out.stride[i] = weight.out_features;
  }
  return fill(tensor, [&] { return functions(self).linear(call); });
}

// linear_split(x, weight, bias or None, addend or None) -> tuple of tensors [rows, sizes[i]]
PyObject* linear_split(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  LinearCall call;
  Added added;
  if (!expect(count, 4) || !read_linear(call, objects) || !read_addend(objects[3], added, call)) return nullptr;
  const Packed& weight = *call.weight;
  PyObject* tensors = PyTuple_New(weight.parts);
  for (int i = 0; tensors && i < weight.parts; ++i) {
    const int64_t shape[] = {call.rows, weight.size[i]};
    PyObject* tensor = make_tensor(call.out.dtype, 2, shape, &call.out.data[i]);
    if (!tensor) return Py_DECREF(tensors), nullptr;
    call.out.stride[i] = weight.size[i];
    PyTuple_SET_ITEM(tensors, i, tensor);
  }
  return fill(tensors, [&] { return functions(self).linear(call); });
}

// linear_gated(x, weight of two parts of one size, bias or None, activation, addend or None) -> tensor [rows, sizes[0]]
PyObject* linear_gated(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  LinearCall call;
  Added added;
  if (!expect(count, 5) || !read_linear(call, objects) || !read_addend(objects[4], added, call)) return nullptr;
  const Packed& weight = *call.weight;
  if (weight.parts != 2 || weight.size[0] != weight.size[1])
    return PyErr_Format(PyExc_ValueError, "Only a weight of two parts of one size can be gated; this one has %d parts.",
                        weight.parts);
  unpack(objects[3], call.gate);
  const int64_t shape[] = {call.rows, weight.size[0]};
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_tensor(call.out.dtype, 2, shape, &call.out.data[0]);
  call.out.stride[0] = shape[1];
  return fill(tensor, [&] { return functions(self).linear(call); });
}

// --- elementwise ----------------------------------------------------------------------------------------------------

bool read_scale(PyObject* object, const Tensor& x, Tensor& to) {  // the weight of a norm: one value for each feature
  return read_as(object, "weight", kFloat32, x.dimensions ? 1 : 0, x.shape + (x.dimensions ? x.dimensions - 1 : 0), to);
}

// rms_norm(x, weight, eps) -> tensor
PyObject* rms_norm(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x, weight;
  if (!expect(count, 3) || !read_activation(objects[0], "x", x) ||
      !read_as(objects[1], "weight", kFloat32, {kAny}, weight))
    return nullptr;
  const long size = weight.shape[0], heads = size ? x.features() / size : 1;
  if (x.features() != heads * size || !x.dimensions)
    return PyErr_Format(PyExc_ValueError, "weight has %ld values, of which the %ld features of x are no multiple.", size,
                        x.features());
  double eps = PyFloat_AsDouble(objects[2]);
  void* out = nullptr;
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(x, &out);
  return fill(tensor, [&] {
    return functions(self).rms_norm(x.data, static_cast<const float*>(weight.data), out, x.dtype,
                                    x.rows() * heads, size, eps);
  });
}

// add_rms_norm(x, residual, weight, eps) -> tensor; the residual changes in place
PyObject* add_rms_norm(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x, residual, weight;
  if (!expect(count, 4) || !read_activation(objects[0], "x", x) ||
      !read_like(objects[1], "residual", x, residual) || !read_scale(objects[2], x, weight))
    return nullptr;
  double eps = PyFloat_AsDouble(objects[3]);
  void* out = nullptr;
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(x, &out);
  return fill(tensor, [&] {
    return functions(self).add_rms_norm(x.data, residual.data, static_cast<const float*>(weight.data), out, x.dtype,
                                        x.rows(), x.features(), eps);
  });
}

// layer_norm(x, weight, bias, eps) -> tensor
PyObject* layer_norm(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x, weight, bias;
  if (!expect(count, 4) || !read_activation(objects[0], "x", x) || !read_scale(objects[1], x, weight) ||
      !read_like(objects[2], "bias", weight, bias))
    return nullptr;
  double eps = PyFloat_AsDouble(objects[3]);
  void* out = nullptr;
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(x, &out);
  return fill(tensor, [&] {
    return functions(self).layer_norm(x.data, static_cast<const float*>(weight.data),
                                      static_cast<const float*>(bias.data), out, x.dtype, x.rows(), x.features(), eps);
  });
}

// add_layer_norm(x, residual, weight, bias, eps) -> tensor; the residual changes in place
PyObject* add_layer_norm(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x, residual, weight, bias;
  if (!expect(count, 5) || !read_activation(objects[0], "x", x) || !read_like(objects[1], "residual", x, residual) ||
      !read_scale(objects[2], x, weight) || !read_like(objects[3], "bias", weight, bias))
    return nullptr;
  double eps = PyFloat_AsDouble(objects[4]);
  void* out = nullptr;
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(x, &out);
  return fill(tensor, [&] {
    return functions(self).add_layer_norm(x.data, residual.data, static_cast<const float*>(weight.data),
                                          static_cast<const float*>(bias.data), out, x.dtype, x.rows(), x.features(),
                                          eps);
  });
}

// activate(x, kind) -> tensor
PyObject* activate(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x;
  Activation kind;
  if (!expect(count, 2) || !read_activation(objects[0], "x", x)) return nullptr;
  unpack(objects[1], kind);
  void* out = nullptr;
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(x, &out);
  return fill(tensor, [&] { return functions(self).activate(x.data, out, x.dtype, x.rows() * x.features(), kind); });
}

// gate_and_mul(gate, up, kind) -> tensor
PyObject* gate_and_mul(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor gate, up;
  Gate kind;
  if (!expect(count, 3) || !read_activation(objects[0], "gate", gate) || !read_like(objects[1], "up", gate, up))
    return nullptr;
  unpack(objects[2], kind);
  void* out = nullptr;
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(gate, &out);
  return fill(tensor, [&] {
    return functions(self).gate_and_mul(gate.data, up.data, out, gate.dtype, gate.rows() * gate.features(), kind);
  });
}

// --- attention ------------------------------------------------------------------------------------------------------

// rotary(query, key, positions, cos_sin, head_size, interleaved, offset)
PyObject* rotary(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor query, key, positions, table;
  long size, offset;
  bool interleaved;
  if (!expect(count, 7) || !read_activation(objects[0], "query", query, 2) ||
      !read_as(objects[1], "key", query.dtype, {query.shape[0], kAny}, key) ||
      !read_as(objects[2], "positions", kInt64, {query.shape[0]}, positions) ||
      !read_as(objects[3], "cos_sin", kFloat32, {kAny, kAny}, table))
    return nullptr;
  unpack(objects[4], size), unpack(objects[5], interleaved), unpack(objects[6], offset);
  if (PyErr_Occurred()) return nullptr;
  const long rotating = table.shape[1];
  if (offset < 0 || size <= offset || query.shape[1] % size || key.shape[1] % (size - offset) ||
      rotating > size - offset || rotating % 2)
    return PyErr_Format(PyExc_ValueError,
                        "Heads of size %ld, %ld of it rotating, do not fit a query of %ld and a key of %ld features.",
                        size, rotating, long(query.shape[1]), long(key.shape[1]));
  const RotaryCall call = {query.data,           key.data, query.dtype, query.shape[0], query.shape[1] / size,
                           key.shape[1] / (size - offset), size,
                           static_cast<const int64_t*>(positions.data), static_cast<const float*>(table.data),
                           table.shape[0], rotating, interleaved, offset};
  const char* message;
  Py_BEGIN_ALLOW_THREADS message = functions(self).rotary(call);
  Py_END_ALLOW_THREADS return result(message);
}

// A layer's cache.
struct Cache {
  void* data;
  bool int8;
  long blocks, kv_heads, block_size, head_size;
};

// The cache of one layer, [blocks, 2, kv_heads, block_size, head_size], for rows of `features` in `dtype`: of that dtype,
// or of int8, where each row is longer by a scale.
bool read_cache(PyObject* object, int dtype, const char* name, long features, bool grouped, Cache& to) {
  static const char* const kNames[] = {"float32 or int8", "bfloat16 or int8", "float16 or int8"};
  static const int64_t kShape[] = {kAny, 2, kAny, kAny, kAny};
  Tensor cache;
  if (!read(object, "cache", cache, kNames[dtype], [&](int code) { return code == dtype || code == kInt8; }) ||
      !expect_shape(object, "cache", 5, kShape, cache))
    return false;
  const bool int8 = cache.dtype == kInt8;
  to = {cache.data, int8, cache.shape[0], cache.shape[2], cache.shape[3], cache.shape[4] - (int8 ? kScaleBytes : 0)};
  const long row = to.kv_heads * to.head_size;
  if (row > 0 && (grouped ? features % row == 0 : features == row)) return true;
  PyErr_Format(PyExc_ValueError, "%s has %ld features; the cache has %ld heads of %ld.", name, features, to.kv_heads,
               to.head_size);
  return false;
}

// write_kv(key, value, cache, slots)
PyObject* write_kv(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor key, value, slots;
  Cache cache;
  if (!expect(count, 4) || !read_activation(objects[0], "key", key, 2) ||
      !read_like(objects[1], "value", key, value) ||
      !read_cache(objects[2], key.dtype, "key", key.shape[1], false, cache) ||
      !read_as(objects[3], "slots", kInt64, {key.shape[0]}, slots))
    return nullptr;
  const WriteCall call = {key.data,         value.data,   cache.data,       key.dtype,
                          cache.int8,       key.shape[0], cache.kv_heads,   cache.head_size,
                          cache.blocks,     cache.block_size, static_cast<const int64_t*>(slots.data)};
  const char* message;
  Py_BEGIN_ALLOW_THREADS message = functions(self).write_kv(call);
  Py_END_ALLOW_THREADS return result(message);
}

// Where the sequences of a batch lie: query_start, seq_lens, block_tables.
bool read_sequences(PyObject* const* objects, AttentionCall& call) {
  Tensor starts, lengths, tables;
  if (!read_as(objects[1], "seq_lens", kInt32, {kAny}, lengths) ||
      !read_as(objects[0], "query_start", kInt32, {lengths.shape[0] + 1}, starts) ||
      !read_as(objects[2], "block_tables", kInt32, {lengths.shape[0], kAny}, tables))
    return false;
  call.query_start = static_cast<const int32_t*>(starts.data);
  call.seq_lens = static_cast<const int32_t*>(lengths.data);
  call.block_tables = static_cast<const int32_t*>(tables.data);
  call.sequences = lengths.shape[0], call.table_stride = tables.shape[1];
  return true;
}

// attention(query, cache, query_start, seq_lens, block_tables, scale, soft_cap or 0, window or 0, causal,
// sinks or None) -> tensor
PyObject* attention(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor query;
  Cache cache;
  AttentionCall call;
  Tensor sinks;
  if (!expect(count, 10) || !read_activation(objects[0], "query", query, 2) ||
      !read_cache(objects[1], query.dtype, "query", query.shape[1], true, cache) || !read_sequences(objects + 2, call))
    return nullptr;
  unpack(objects[5], call.scale), unpack(objects[6], call.soft_cap);
  unpack(objects[7], call.window), unpack(objects[8], call.causal);
  if (objects[9] != Py_None) {
    if (!read_as(objects[9], "sinks", kFloat32, {query.shape[1] / cache.head_size}, sinks)) return nullptr;
    call.sinks = static_cast<const float*>(sinks.data);
  }
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(query, &call.out);
  call.query = query.data, call.cache = cache.data, call.dtype = query.dtype, call.tokens = query.shape[0];
  call.int8_cache = cache.int8, call.num_blocks = cache.blocks, call.kv_heads = cache.kv_heads;
  call.block_size = cache.block_size, call.head_size = cache.head_size, call.heads = query.shape[1] / call.head_size;
  call.row_heads = call.heads;
  call.latent = false, call.value_size = call.head_size;
  return fill(tensor, [&] { return functions(self).attention(call); });
}

}  // namespace
}  // namespace vllm_ms
