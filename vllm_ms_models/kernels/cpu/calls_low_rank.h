// Low-rank adapters from Python: `reduce`, and the addends of products. Used by calls.h only.
#pragma once

#include <vector>

#include "binding.h"
#include "tensors.h"

namespace vllm_ms {
namespace {

bool read_weight(PyObject* object, const Packed*& to);       // calls.h
const Functions& functions(PyObject* self);  // module.cpp

// The weight that is an attribute of a `LowRank`.
bool read_matrix(PyObject* adapter, PyObject* name, const Packed*& to) {
  PyObject* matrix = PyObject_GetAttr(adapter, name);
  const bool good = matrix && read_weight(matrix, to);
  Py_XDECREF(matrix);
  if (good && to->bits) PyErr_SetString(PyExc_ValueError, "An adapter's matrices have integers; floats are expected.");
  return good && !to->bits;
}

// A tuple of `LowRank` or None, for a linear of so many parts (0: of any).
bool read_adapters(PyObject* tuple, std::vector<LowRank>& to, int parts) {
  static PyObject* const down = PyUnicode_InternFromString("down");
  static PyObject* const up = PyUnicode_InternFromString("up");
  static PyObject* const scales = PyUnicode_InternFromString("scales");
  if (!PyTuple_Check(tuple)) return PyErr_SetString(PyExc_ValueError, "adapters is no tuple."), false;
  to.resize(size_t(PyTuple_GET_SIZE(tuple)));
  for (size_t i = 0; i < to.size(); ++i) {
    PyObject* object = PyTuple_GET_ITEM(tuple, Py_ssize_t(i));
    LowRank& adapter = to[i] = {};
    if (object == Py_None) continue;
    if (!read_matrix(object, down, adapter.down) || !read_matrix(object, up, adapter.up)) return false;
    if (!parts) parts = adapter.down->parts;
    PyObject* factors = PyObject_GetAttr(object, scales);
    if (!factors) return false;
    const bool fits = adapter.down->parts == parts && adapter.up->parts == parts && PyTuple_Check(factors) &&
                      PyTuple_GET_SIZE(factors) == parts;
    for (int part = 0; fits && part < parts; ++part)
      adapter.scales[part] = float(PyFloat_AsDouble(PyTuple_GET_ITEM(factors, part)));
    Py_DECREF(factors);
    if (PyErr_Occurred()) return false;
    if (!fits) return PyErr_Format(PyExc_ValueError, "Adapter %zu is not for a linear of %d parts.", i, parts), false;
    for (int part = 0; part < parts; ++part)
      if (adapter.down->size[part] > adapter.up->in_features)
        return PyErr_Format(PyExc_ValueError, "Adapter %zu has rank %ld, but %ld inputs to its second matrix.", i,
                            adapter.down->size[part], adapter.up->in_features),
               false;
  }
  return true;
}

// reduce(x, rows, adapters, width) -> tensor [tokens, parts * width]
PyObject* reduce(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  Tensor x, rows;
  std::vector<LowRank> adapters;
  ReduceCall call = {};
  if (!expect(count, 4) || !read_activation(objects[0], "x", x, 2) ||
      !read_as(objects[1], "rows", kInt32, {x.shape[0]}, rows) || !read_adapters(objects[2], adapters, 0))
    return nullptr;
  unpack(objects[3], call.width);
  if (PyErr_Occurred()) return nullptr;
  for (const LowRank& adapter : adapters) {
    if (!adapter.down) continue;
    call.parts = adapter.down->parts;
    if (adapter.down->in_features != x.shape[1])
      return PyErr_Format(PyExc_ValueError, "x has %ld features; an adapter has %ld inputs.", long(x.shape[1]),
                          adapter.down->in_features);
    for (long part = 0; part < call.parts; ++part)
      if (adapter.down->size[part] > call.width)
        return PyErr_Format(PyExc_ValueError, "An adapter has rank %ld, which is more than %ld.",
                            adapter.down->size[part], call.width);
  }
  call.x = x.data, call.x_dtype = x.dtype, call.tokens = x.shape[0], call.features = x.shape[1];
  call.rows = static_cast<const int32_t*>(rows.data), call.adapters = adapters.data(), call.count = long(adapters.size());
  const int64_t shape[] = {call.tokens, call.parts * call.width};
  void* out = nullptr;
  PyObject* tensor = make_tensor(kFloat32, 2, shape, &out);
  call.out = static_cast<float*>(out);
  return fill(tensor, [&] { return functions(self).reduce(call); });
}

// The addend of a product, and what it refers to.
struct Added {
  AddendCall call = {};
  std::vector<LowRank> adapters;
};

// None, or an `Addend`, for the rows of `call`.
bool read_addend(PyObject* object, Added& to, LinearCall& call) {
  static PyObject* const names[] = {PyUnicode_InternFromString("rows"), PyUnicode_InternFromString("adapters"),
                                    PyUnicode_InternFromString("reduced")};
  if (object == Py_None) return true;
  const Packed& weight = *call.weight;
  PyObject* found[3] = {};
  Tensor rows, reduced;
  for (int i = 0; i < 3; ++i) found[i] = PyObject_GetAttr(object, names[i]);
  const bool good = found[0] && found[1] && found[2] && read_as(found[0], "rows", kInt32, {call.rows}, rows) &&
                    read_as(found[2], "reduced", kFloat32, {call.rows, kAny}, reduced) &&
                    read_adapters(found[1], to.adapters, weight.parts);
  for (PyObject* each : found) Py_XDECREF(each);  // the addend has them, and the caller the addend
  if (!good) return false;
  to.call.width = reduced.shape[1] / weight.parts;
  for (const LowRank& adapter : to.adapters)
    for (int part = 0; adapter.up && part < weight.parts; ++part)
      if (adapter.up->size[part] != weight.size[part] || adapter.down->size[part] > to.call.width)
        return PyErr_Format(PyExc_ValueError, "An adapter of %ld outputs and rank %ld does not fit %ld and %ld.",
                            adapter.up->size[part], adapter.down->size[part], weight.size[part], to.call.width),
               false;
  to.call.rows = static_cast<const int32_t*>(rows.data), to.call.reduced = static_cast<const float*>(reduced.data);
  to.call.adapters = to.adapters.data(), to.call.count = long(to.adapters.size());
  call.addend = &to.call;
  return true;
}

}  // namespace
}  // namespace vllm_ms
