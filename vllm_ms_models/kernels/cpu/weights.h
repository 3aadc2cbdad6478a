// Making weights, and loading small integers into them, for Python. Used by module.cpp only.
#pragma once

#include "calls.h"

namespace vllm_ms {
namespace {

void delete_packed(PyObject* capsule) { delete static_cast<Packed*>(PyCapsule_GetPointer(capsule, nullptr)); }

// Puts the panels of parts of `sizes` in order; false with an exception set.
bool lay_out(Packed& weight, PyObject* sizes) {
  if (!PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) > kMaxParts)
    return PyErr_Format(PyExc_ValueError, "A fused weight has at most %d parts.", kMaxParts), false;
  weight.parts = int(PyTuple_GET_SIZE(sizes));
  for (int i = 0; i < weight.parts; ++i) weight.size[i] = PyLong_AsLong(PyTuple_GET_ITEM(sizes, i));
  if (weight.parts == 2 && weight.size[0] == weight.size[1]) weight.panel_step = 2;
  for (int i = 0; i < weight.parts; ++i) {
    weight.first_panel[i] = weight.panel_step == 1 ? weight.panels : i;
    weight.first_row[i] = weight.out_features;
    weight.panels += (weight.size[i] + 15) / 16;
    weight.out_features += weight.size[i];
  }
  return !PyErr_Occurred();
}

// (tensor, address of the Packed, capsule that keeps it)
PyObject* give_weight(Packed* weight, PyObject* tensor, PyObject* capsule) {
  if (!tensor) return Py_DECREF(capsule), nullptr;
  return Py_BuildValue("(NNN)", tensor, PyLong_FromVoidPtr(weight), capsule);
}

// new_weight(dtype, in_features, sizes) -> (tensor, address of the Packed, capsule that keeps it)
PyObject* new_weight(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 3)) return nullptr;
  Packed* weight = new Packed;
  PyObject* capsule = PyCapsule_New(weight, nullptr, delete_packed);
  unpack(objects[0], weight->dtype), unpack(objects[1], weight->in_features);
  const bool pairs = weight->dtype == kBfloat16;
  const long steps = pairs ? (weight->in_features + 1) / 2 : weight->in_features;
  weight->panel_bytes = steps * 16 * (pairs ? 4 : dtype_size(weight->dtype));
  PyObject* tensor = nullptr;
  if (lay_out(*weight, objects[2])) {
    const int64_t shape[] = {weight->panels, steps, pairs ? 32 : 16};
    tensor = make_tensor(weight->dtype, 3, shape, &weight->data, true);
  }
  return give_weight(weight, tensor, capsule);
}

// new_integer_weight(in_features, sizes, bits, group size, groups, input) -> as new_weight
PyObject* new_integer_weight(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 6)) return nullptr;
  Packed* weight = new Packed;
  PyObject* capsule = PyCapsule_New(weight, nullptr, delete_packed);
  int input;
  unpack(objects[0], weight->in_features), unpack(objects[2], weight->bits), unpack(objects[3], weight->group_size);
  unpack(objects[4], weight->groups), unpack(objects[5], input);
  weight->dtype = kInt8;
  weight->input = Input(input);
  for (float& scale : weight->input_scale) scale = 1.0f;
  const long depth = weight->bits == 8 ? 4 : 8;  // inputs in 64 bytes of a panel
  weight->panel_bytes = (weight->in_features + depth - 1) / depth * 64;
  PyObject* tensor = nullptr;
  void* data = nullptr;
  if (lay_out(*weight, objects[1])) {
    const long values = weight->panels * weight->panel_bytes, scales = weight->panels * weight->groups * 64;
    const long addends = weight->input == Input::kFloat ? 0 : weight->panels * 64;
    const int64_t shape[] = {values + scales + addends + scales / 4};
    tensor = make_tensor(kInt8, 1, shape, &data, true);
    char* at = static_cast<char*>(weight->data = data) + values;
    weight->scales = reinterpret_cast<float*>(at);
    weight->addends = addends ? reinterpret_cast<int32_t*>(at + scales) : nullptr;
    weight->zeros = reinterpret_cast<int8_t*>(at + scales + addends);
  }
  return give_weight(weight, tensor, capsule);
}

// The weight of integers behind a Python `PackedWeight`; its caller has checked that it is one (backend.py).
bool read_integers(PyObject* object, Packed*& to) {
  const Packed* weight;
  if (!read_weight(object, weight)) return false;
  to = const_cast<Packed*>(weight);
  return true;
}

// load_integers(weight, part, first_row, address of the values, rows, bytes from row to row)
PyObject* load_integers(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Packed* weight;
  const int8_t* values;
  int part;
  long first_row, rows, stride;
  if (!expect(count, 6) || !read_integers(objects[0], weight)) return nullptr;
  unpack(objects[1], part), unpack(objects[2], first_row), unpack(objects[3], values);
  unpack(objects[4], rows), unpack(objects[5], stride);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS pack_integers(*weight, part, first_row, values, rows, stride);
  Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

// load_scales(weight, part, first_row, addresses of scales, zeros or 0, addends or 0, rows)
PyObject* load_scales(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Packed* weight;
  const float* scales;
  const int8_t* zeros;
  const int32_t* addends;
  int part;
  long first_row, rows;
  if (!expect(count, 7) || !read_integers(objects[0], weight)) return nullptr;
  unpack(objects[1], part), unpack(objects[2], first_row), unpack(objects[3], scales), unpack(objects[4], zeros);
  unpack(objects[5], addends), unpack(objects[6], rows);
  if (PyErr_Occurred()) return nullptr;
  pack_scales(*weight, part, first_row, scales, zeros, addends, rows);
  Py_RETURN_NONE;
}

// widen_float8(addresses of values, scales and result, rows, columns, stride, scales of a row, width, offset)
PyObject* widen_float8(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Float8Rows rows;
  float* to;
  if (!expect(count, 9)) return nullptr;
  unpack(objects[0], rows.values), unpack(objects[1], rows.scales), unpack(objects[2], to);
  unpack(objects[3], rows.rows), unpack(objects[4], rows.columns), unpack(objects[5], rows.stride);
  unpack(objects[6], rows.scale_count), unpack(objects[7], rows.width), unpack(objects[8], rows.offset);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS vllm_ms::widen_float8(rows, to);
  Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

// round_rows(address of float32, rows, columns, addresses of int8 and scales)
PyObject* round_rows(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  const float* values;
  int8_t* to;
  float* scales;
  long rows, columns;
  if (!expect(count, 5)) return nullptr;
  unpack(objects[0], values), unpack(objects[1], rows), unpack(objects[2], columns);
  unpack(objects[3], to), unpack(objects[4], scales);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS vllm_ms::round_rows(values, rows, columns, to, scales);
  Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

// set_input(weight, part, scale, offset)
PyObject* set_input(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  Packed* weight;
  int part, offset;
  double scale;
  if (!expect(count, 4) || !read_integers(objects[0], weight)) return nullptr;
  unpack(objects[1], part), unpack(objects[2], scale), unpack(objects[3], offset);
  if (PyErr_Occurred()) return nullptr;
  weight->input_scale[part] = float(scale);
  weight->input_offset[part] = offset;
  Py_RETURN_NONE;
}

}  // namespace
}  // namespace vllm_ms
