// The functions that Python calls for collectives through shared memory. Used by module.cpp only.
//
// `ranks` is what join_ranks returned. Tensors of other dtypes than the kernels', and those that are not contiguous,
// are left alone: the result is None.
#pragma once

#include <cerrno>
#include <system_error>

#include "calls.h"
#include "collectives.h"

namespace vllm_ms {
namespace {

constexpr const char* kRanksCapsule = "vllm_ms_ranks";

// Whether a Python signal handler has raised (the GIL is not held).
bool signal_raised() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return raised;
}

Ranks* read_ranks(PyObject* object) { return static_cast<Ranks*>(PyCapsule_GetPointer(object, kRanksCapsule)); }

// new_shared_memory(size) -> (descriptor, bytes) of what ranks map
PyObject* new_shared_memory(PyObject*, PyObject* size) {
  const long ranks = PyLong_AsLong(size);
  if (PyErr_Occurred()) return nullptr;
  if (ranks < 1 || ranks > kMaxRanks)
    return PyErr_Format(PyExc_ValueError, "%ld ranks cannot share memory; at most %d can.", ranks, kMaxRanks);
  const int memory = Ranks::new_memory(int(ranks));
  return memory < 0 ? PyErr_SetFromErrno(PyExc_OSError) : Py_BuildValue("il", memory, Ranks::bytes(int(ranks)));
}

// join_ranks(memory, rank, numbers of the processes, crowded, name) -> ranks
PyObject* join_ranks(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 5)) return nullptr;
  Ranks::Setup setup;
  unpack(objects[0], setup.memory), unpack(objects[1], setup.rank), unpack(objects[3], setup.crowded);
  if (!PyTuple_Check(objects[2])) return PyErr_Format(PyExc_TypeError, "The processes are a tuple of numbers.");
  setup.size = int(PyTuple_GET_SIZE(objects[2]));
  for (int i = 0; i < setup.size; ++i) {
    setup.processes.push_back(0);
    unpack(PyTuple_GET_ITEM(objects[2], i), setup.processes.back());
  }
  const char* name = PyUnicode_AsUTF8(objects[4]);
  if (!name || PyErr_Occurred()) return nullptr;
  setup.name = name;
  Ranks* ranks = nullptr;
  try {
    ranks = new Ranks(setup, signal_raised);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  return PyCapsule_New(ranks, kRanksCapsule, [](PyObject* capsule) { delete read_ranks(capsule); });
}

// Runs function(ranks) without the GIL. On success: `value`, whose reference is taken.
template <class Function>
PyObject* meeting(PyObject* object, PyObject* value, const Function& function) {
  Ranks* ranks = value ? read_ranks(object) : nullptr;
  if (!ranks) return Py_XDECREF(value), nullptr;
  const char* message;
  Py_BEGIN_ALLOW_THREADS message = function(*ranks);
  Py_END_ALLOW_THREADS if (!message) return value;
  Py_DECREF(value);
  if (message != Ranks::kInterrupted) PyErr_SetString(PyExc_RuntimeError, message);
  return nullptr;
}

// Reads a tensor. If that is one to be left alone: None, without an error; null with one.
PyObject* read_shared(PyObject* object, Tensor& to) {
  auto any = [](int) { return true; };
  if (!PyObject_TypeCheck(object, mindspore.type)) return read(object, "x", to, "any", any), nullptr;
  PyObject* contiguous = PyObject_Vectorcall(mindspore.is_contiguous, &object, 1, nullptr);
  if (!contiguous) return nullptr;
  Py_DECREF(contiguous);
  if (contiguous != Py_True) return Py_NewRef(Py_None);
  if (!read(object, "x", to, "any", any)) return nullptr;
  return Py_NewRef(to.dtype < 0 ? Py_None : Py_True);
}

// Runs function(tensor) for a tensor that can be shared.
template <class Function>
PyObject* with_tensor(PyObject* object, const Function& function) {
  Tensor x;
  PyObject* state = read_shared(object, x);
  if (state != Py_True) return state;
  Py_DECREF(state);
  return function(x);
}

long items_of(const Tensor& x) { return x.rows() * x.features(); }

// Splits the first axis of a shape; false with an error if it does not divide.
bool split_rows(Tensor& x, const Ranks& ranks) {
  if (x.dimensions && x.shape[0] % ranks.size() == 0) return x.shape[0] /= ranks.size(), true;
  PyErr_Format(PyExc_ValueError, "x has %ld rows, which cannot be divided among %d ranks.",
               x.dimensions ? long(x.shape[0]) : 1, ranks.size());
  return false;
}

// all_reduce(ranks, x) -> x
PyObject* all_reduce(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 2)) return nullptr;
  return with_tensor(objects[1], [&](Tensor& x) {
    return meeting(objects[0], Py_NewRef(objects[1]), [&](Ranks& ranks) {
      return collectives::all_reduce(ranks, functions(self).add_parts, x.data, x.dtype, items_of(x));
    });
  });
}

// reduce_scatter(ranks, x) -> tensor [n, ...] of x [size * n, ...]
PyObject* reduce_scatter(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 2)) return nullptr;
  return with_tensor(objects[1], [&](Tensor& x) -> PyObject* {
    Ranks* ranks = read_ranks(objects[0]);
    if (!ranks || !split_rows(x, *ranks)) return nullptr;
    void* out = nullptr;
    PyObject* tensor = make_like(x, &out);
    return meeting(objects[0], tensor, [&](Ranks& all) {
      return collectives::reduce_scatter(all, functions(self).add_parts, x.data, out, x.dtype, items_of(x));
    });
  });
}

// all_gather(ranks, x) -> tensor [..., size * n] of x [..., n]
PyObject* all_gather(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 2)) return nullptr;
  return with_tensor(objects[1], [&](Tensor& x) -> PyObject* {
    Ranks* ranks = read_ranks(objects[0]);
    if (!ranks) return nullptr;
    if (!x.dimensions) return PyErr_Format(PyExc_ValueError, "x is a single number, which has no last axis.");
    const long rows = x.rows(), bytes = x.features() * dtype_size(x.dtype);
    void* out = nullptr;
    x.shape[x.dimensions - 1] *= ranks->size();
    PyObject* tensor = make_like(x, &out);
    return meeting(objects[0], tensor,
                   [&](Ranks& all) { return collectives::all_gather(all, x.data, out, rows, bytes); });
  });
}

// all_to_all(ranks, x) -> tensor like x
PyObject* all_to_all(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 2)) return nullptr;
  return with_tensor(objects[1], [&](Tensor& x) -> PyObject* {
    Ranks* ranks = read_ranks(objects[0]);
    void* out = nullptr;
    PyObject* tensor = ranks ? make_like(x, &out) : nullptr;
    if (!tensor || !split_rows(x, *ranks)) return Py_XDECREF(tensor), nullptr;
    return meeting(objects[0], tensor, [&](Ranks& all) {
      return collectives::all_to_all(all, x.data, out, items_of(x) * dtype_size(x.dtype));
    });
  });
}

// broadcast(ranks, x, source) -> x
PyObject* broadcast(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 3)) return nullptr;
  const Ranks* all = read_ranks(objects[0]);
  const long source = PyLong_AsLong(objects[2]);
  if (PyErr_Occurred()) return nullptr;
  if (source < 0 || source >= all->size())
    return PyErr_Format(PyExc_ValueError, "There is no rank %ld among %d.", source, all->size());
  return with_tensor(objects[1], [&](Tensor& x) {
    return meeting(objects[0], Py_NewRef(objects[1]), [&](Ranks& ranks) {
      return collectives::broadcast(ranks, int(source), x.data, items_of(x) * dtype_size(x.dtype));
    });
  });
}

// barrier(ranks)
PyObject* barrier(PyObject*, PyObject* ranks) {
  return meeting(ranks, Py_NewRef(Py_None), [](Ranks& all) { return collectives::barrier(all); });
}

}  // namespace
}  // namespace vllm_ms
