// Between Python objects and C++ values: numbers, and errors. tensors.h does tensors.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"

namespace vllm_ms {
namespace {

void unpack(PyObject* object, long& to) { to = PyLong_AsLong(object); }
void unpack(PyObject* object, int& to) { to = int(PyLong_AsLong(object)); }
void unpack(PyObject* object, bool& to) { to = PyObject_IsTrue(object) == 1; }
void unpack(PyObject* object, double& to) { to = PyFloat_AsDouble(object); }
void unpack(PyObject* object, Gate& to) { to = Gate(PyLong_AsLong(object)); }
void unpack(PyObject* object, Activation& to) { to = Activation(PyLong_AsLong(object)); }
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

}  // namespace
}  // namespace vllm_ms
