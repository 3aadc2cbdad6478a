// Between Python objects and C++ values: arguments, results, new tensors. Used by module.cpp only.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"
#include "memory.h"

namespace vllm_ms {
namespace {

PyObject* import_tensor = nullptr;  // mindspore's from_dlpack

// --- arguments ------------------------------------------------------------------------------------------------------

void unpack(PyObject* object, long& to) { to = PyLong_AsLong(object); }
void unpack(PyObject* object, int& to) { to = int(PyLong_AsLong(object)); }
void unpack(PyObject* object, bool& to) { to = PyObject_IsTrue(object) == 1; }
void unpack(PyObject* object, double& to) { to = PyFloat_AsDouble(object); }
void unpack(PyObject* object, Gate& to) { to = Gate(PyLong_AsLong(object)); }
template <class T>
void unpack(PyObject* object, T*& to) {
  to = static_cast<T*>(PyLong_AsVoidPtr(object));
}

bool expect(Py_ssize_t found, Py_ssize_t wanted) {
  if (found != wanted) PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, found);
  return found == wanted;
}

PyObject* result(const char* message) {
  if (message) return PyErr_SetString(PyExc_ValueError, message), nullptr;
  Py_RETURN_NONE;
}

// --- tensors --------------------------------------------------------------------------------------------------------

constexpr const char* kCapsule = "dltensor";

void drop_capsule(PyObject* capsule) {  // nobody imported it (an importer renames the capsule)
  if (!PyCapsule_IsValid(capsule, kCapsule)) return;
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsule));
  managed->deleter(managed);
}

// A new MindSpore tensor; `data` is where its values are.
PyObject* make_tensor(int dtype, int dimensions, const int64_t* shape, void** data, bool zeroed = false) {
  DLManagedTensor* managed = new_tensor(dtype, dimensions, shape, zeroed);
  if (!managed) return PyErr_NoMemory();
  *data = managed->tensor.data;
  PyObject* capsule = PyCapsule_New(managed, kCapsule, drop_capsule);
  if (!capsule) return managed->deleter(managed), nullptr;
  PyObject* tensor = PyObject_CallOneArg(import_tensor, capsule);
  Py_DECREF(capsule);
  return tensor;
}

// Reads a tuple of sizes.
int read_shape(PyObject* tuple, int64_t* shape) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) > kMaxDimensions)
    return PyErr_SetString(PyExc_ValueError, "A shape is a tuple of at most 8 sizes."), -1;
  int dimensions = int(PyTuple_GET_SIZE(tuple));
  for (int i = 0; i < dimensions; ++i) shape[i] = PyLong_AsLong(PyTuple_GET_ITEM(tuple, i));
  return PyErr_Occurred() ? -1 : dimensions;
}

// Runs `function` without the GIL and returns `tensor`, or raises and drops it.
template <class Function>
PyObject* fill(PyObject* tensor, const Function& function) {
  if (!tensor) return nullptr;
  const char* message;
  Py_BEGIN_ALLOW_THREADS message = function();
  Py_END_ALLOW_THREADS if (!message) return tensor;
  Py_DECREF(tensor);
  return result(message);
}

}  // namespace
}  // namespace vllm_ms
