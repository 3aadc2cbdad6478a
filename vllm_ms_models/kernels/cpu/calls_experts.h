// The functions of a mixture of experts that Python calls; calls.h has the others and says how they work.
#pragma once

#include <vector>

#include "calls.h"

namespace vllm_ms {
namespace {

// choose_experts(logits, bias or None, top_k, groups, top_groups, sigmoid, two best, renormalize, scale) -> (ids, shares)
PyObject* choose_experts(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  RoutingCall call;
  Tensor logits, bias;
  if (!expect(count, 9) || !read_as(objects[0], "logits", kFloat32, {kAny, kAny}, logits)) return nullptr;
  bias.data = nullptr;
  if (objects[1] != Py_None && !read_as(objects[1], "bias", kFloat32, {logits.shape[1]}, bias)) return nullptr;
  unpack(objects[2], call.top_k), unpack(objects[3], call.groups), unpack(objects[4], call.top_groups);
  unpack(objects[5], call.sigmoid), unpack(objects[6], call.two_best), unpack(objects[7], call.renormalize);
  unpack(objects[8], call.scale);
  if (PyErr_Occurred()) return nullptr;
  call.logits = static_cast<const float*>(logits.data), call.bias = static_cast<const float*>(bias.data);
  call.tokens = logits.shape[0], call.experts = logits.shape[1];
  const int64_t shape[] = {call.tokens, call.top_k};
  void *ids_data = nullptr, *shares_data = nullptr;
  PyObject* ids = make_tensor(kInt32, 2, shape, &ids_data);
  PyObject* shares = ids ? make_tensor(kFloat32, 2, shape, &shares_data) : nullptr;
  if (!shares) return Py_XDECREF(ids), nullptr;
  call.ids = static_cast<int32_t*>(ids_data), call.shares = static_cast<float*>(shares_data);
  return fill(Py_BuildValue("(NN)", ids, shares), [&] { return vllm_ms::choose_experts(call); });
}

// The weights of the experts that were chosen, the others null; `objects` are a list or tuple of each kind.
bool read_experts(PyObject* const* objects, const ExpertsCall& call, std::vector<const Packed*> (&to)[2]) {
  static const char* const kNames[] = {"gate_up", "down"};
  for (int i = 0; i < 2; ++i) {
    if (!PyList_Check(objects[i]) && !PyTuple_Check(objects[i]))
      return PyErr_Format(PyExc_ValueError, "%s is a %s; a list of weights is expected.", kNames[i],
                          Py_TYPE(objects[i])->tp_name),
             false;
    to[i].assign(size_t(PySequence_Fast_GET_SIZE(objects[i])), nullptr);
  }
  if (to[0].size() != to[1].size())
    return PyErr_Format(PyExc_ValueError, "There are %zu weights of gate and up, and %zu of down.", to[0].size(),
                        to[1].size()),
           false;
  for (long choice = 0; choice < call.tokens * call.top_k; ++choice) {
    const long expert = call.ids[choice] - call.first_expert;
    if (expert < 0 || expert >= long(to[0].size()) || to[0][size_t(expert)]) continue;
    for (int i = 0; i < 2; ++i)
      if (!read_weight(PySequence_Fast_GET_ITEM(objects[i], expert), to[i][size_t(expert)])) return false;
    const Packed &gate_up = *to[0][size_t(expert)], &down = *to[1][size_t(expert)];
    if (gate_up.parts != 2 || gate_up.size[0] != gate_up.size[1] || gate_up.in_features != call.features ||
        down.parts != 1 || down.in_features != gate_up.size[0] || down.out_features != call.features)
      return PyErr_Format(PyExc_ValueError, "The weights of expert %ld do not fit x, which has %ld features.",
                          expert + call.first_expert, call.features),
             false;
  }
  return true;
}

// One row for each expert, or None.
bool read_biases(PyObject* object, const char* name, long experts, long features, const float*& to) {
  Tensor bias;
  to = nullptr;
  if (object == Py_None) return true;
  if (!read_as(object, name, kFloat32, {experts, features}, bias)) return false;
  to = static_cast<const float*>(bias.data);
  return true;
}

// experts(x, gate_up, down, ids, shares, activation, addend or None, first_expert, gate_up_bias or None,
// down_bias or None) -> tensor like x
PyObject* experts(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  ExpertsCall call;
  Tensor x, ids, shares, addend;
  if (!expect(count, 10) || !read_activation(objects[0], "x", x, 2) ||
      !read_as(objects[3], "ids", kInt32, {x.shape[0], kAny}, ids) ||
      !read_as(objects[4], "shares", kFloat32, {x.shape[0], ids.shape[1]}, shares))
    return nullptr;
  addend.data = nullptr;
  if (objects[6] != Py_None && !read_like(objects[6], "addend", x, addend)) return nullptr;
  unpack(objects[5], call.gate), unpack(objects[7], call.first_expert);
  if (PyErr_Occurred()) return nullptr;
  call.x = x.data, call.addend = addend.data, call.dtype = x.dtype;
  call.tokens = x.shape[0], call.features = x.shape[1], call.top_k = ids.shape[1];
  call.ids = static_cast<const int32_t*>(ids.data), call.shares = static_cast<const float*>(shares.data);
  std::vector<const Packed*> weights[2];
  if (!read_experts(objects + 1, call, weights)) return nullptr;
  call.gate_up = weights[0].data(), call.down = weights[1].data(), call.experts = long(weights[0].size());
  long width = kAny;  // of gate and up; unknown if no expert is to be multiplied
  for (const Packed* weight : weights[0])
    if (weight) width = weight->out_features;
  if (!read_biases(objects[8], "gate_up_bias", call.experts, width, call.gate_up_bias) ||
      !read_biases(objects[9], "down_bias", call.experts, call.features, call.down_bias))
    return nullptr;
  PyObject* tensor = make_like(x, &call.out);
  return fill(tensor, [&] { return functions(self).experts(call); });
}

}  // namespace
}  // namespace vllm_ms
