// MindSpore tensors from C++: what a kernel must know of its arguments, and new ones. Used by calls.h and module.cpp.
//
// MindSpore's headers are not used. `connect` is given its tensor class and takes what it needs from there: getters and
// methods written in C. Calling them from here takes 0.3 us a tensor, from Python four times that. Nothing about a
// tensor is remembered from one call to the next, because its memory, shape and dtype can be changed.
#pragma once

#include <initializer_list>

#include "binding.h"
#include "kernels.h"
#include "memory.h"

namespace vllm_ms {
namespace {

constexpr int kDTypes = 6;

// Taken from MindSpore, once a process.
struct {
  PyTypeObject* type;
  PyObject *exporter, *from_numpy, *dtype, *shape, *is_contiguous, *data_ptr;
  PyObject* dtypes[kDTypes];  // by their codes
} mindspore;

// --- arguments ------------------------------------------------------------------------------------------------------

// An argument, as long as the call lasts.
struct Tensor {
  void* data;
  int dtype;  // code, or -1
  int dimensions;
  int64_t shape[kMaxDimensions];

  long features() const { return dimensions ? shape[dimensions - 1] : 1; }
  long rows() const {
    long count = 1;
    for (int i = 0; i + 1 < dimensions; ++i) count *= shape[i];
    return count;
  }
};

// Code of a dtype, or -1. They are singletons, but not for certain; comparing two takes 1 us.
int code_of(PyObject* dtype) {
  for (int code = 0; code < kDTypes; ++code)
    if (mindspore.dtypes[code] == dtype) return code;
  for (int code = 0; code < kDTypes; ++code)
    if (PyObject_RichCompareBool(mindspore.dtypes[code], dtype, Py_EQ) == 1) return code;
  PyErr_Clear();
  return -1;
}

PyObject* get(PyObject* getter, PyObject* tensor) {
  return Py_TYPE(getter)->tp_descr_get(getter, tensor, reinterpret_cast<PyObject*>(mindspore.type));
}

// Reads a tuple of sizes.
int read_shape(PyObject* tuple, int64_t* shape) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) > kMaxDimensions)
    return PyErr_SetString(PyExc_ValueError, "A shape is a tuple of at most 8 sizes."), -1;
  int dimensions = int(PyTuple_GET_SIZE(tuple));
  for (int i = 0; i < dimensions; ++i) shape[i] = PyLong_AsLong(PyTuple_GET_ITEM(tuple, i));
  return PyErr_Occurred() ? -1 : dimensions;
}

// Raises ValueError of the format's `name`, `found` (which it drops) and `wanted`.
bool refuse(const char* format, const char* name, PyObject* found, const char* wanted = "") {
  if (found) PyErr_Format(PyExc_ValueError, format, name, found, wanted);
  Py_XDECREF(found);
  return false;
}

// Everything but the dtype's fitness, which `good` decides; `expected` is how it is put in words.
template <class Good>
bool read(PyObject* object, const char* name, Tensor& to, const char* expected, const Good& good) {
  if (!PyObject_TypeCheck(object, mindspore.type))
    return refuse("%s is a %S; a tensor is expected.", name, Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(object))));
  PyObject* dtype = get(mindspore.dtype, object);
  if (!dtype) return false;
  to.dtype = code_of(dtype);
  if (!good(to.dtype)) return refuse("%s has dtype %S; %s is expected.", name, dtype, expected);
  Py_DECREF(dtype);
  PyObject* contiguous = PyObject_Vectorcall(mindspore.is_contiguous, &object, 1, nullptr);
  if (!contiguous) return false;
  Py_DECREF(contiguous);  // True and False live for ever
  if (contiguous != Py_True) return PyErr_Format(PyExc_ValueError, "%s is not contiguous.", name), false;
  PyObject* shape = get(mindspore.shape, object);
  if (!shape) return false;
  to.dimensions = read_shape(shape, to.shape);
  Py_DECREF(shape);
  PyObject* address = to.dimensions < 0 ? nullptr : PyObject_Vectorcall(mindspore.data_ptr, &object, 1, nullptr);
  if (!address) return false;
  to.data = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return !PyErr_Occurred();
}

// An activation: float32, bfloat16 or float16; of so many axes, if given.
bool read_activation(PyObject* object, const char* name, Tensor& to, int dimensions = -1) {
  if (!read(object, name, to, "float32, bfloat16 or float16", [](int code) { return 0 <= code && code <= kFloat16; }))
    return false;
  if (dimensions >= 0 && to.dimensions != dimensions)
    return PyErr_Format(PyExc_ValueError, "%s has %d axes; %d are expected.", name, to.dimensions, dimensions), false;
  return true;
}

constexpr int64_t kAny = -1;

// Whether a tensor that was read has a shape, in which -1 stands for any size.
bool expect_shape(PyObject* object, const char* name, int dimensions, const int64_t* shape, const Tensor& to) {
  bool same = to.dimensions == dimensions;
  for (int i = 0; same && i < dimensions; ++i) same = shape[i] == kAny || shape[i] == to.shape[i];
  if (same) return true;
  PyObject *wanted = PyTuple_New(dimensions), *found = get(mindspore.shape, object);
  for (int i = 0; wanted && i < dimensions; ++i)
    PyTuple_SET_ITEM(wanted, i, shape[i] == kAny ? Py_NewRef(Py_Ellipsis) : PyLong_FromLong(shape[i]));
  if (wanted && found) PyErr_Format(PyExc_ValueError, "%s has shape %S; %S is expected.", name, found, wanted);
  Py_XDECREF(wanted);
  Py_XDECREF(found);
  return false;
}

// A tensor of one dtype and such a shape.
bool read_as(PyObject* object, const char* name, int dtype, int dimensions, const int64_t* shape, Tensor& to) {
  static const char* const kNames[] = {"float32", "bfloat16", "float16", "int32", "int64", "int8"};
  return read(object, name, to, kNames[dtype], [&](int code) { return code == dtype; }) &&
         expect_shape(object, name, dimensions, shape, to);
}

bool read_as(PyObject* object, const char* name, int dtype, std::initializer_list<int64_t> shape, Tensor& to) {
  return read_as(object, name, dtype, int(shape.size()), shape.begin(), to);
}

// Another activation like `model`.
bool read_like(PyObject* object, const char* name, const Tensor& model, Tensor& to) {
  return read_as(object, name, model.dtype, model.dimensions, model.shape, to);
}

// --- results --------------------------------------------------------------------------------------------------------
//
// MindSpore makes a tensor over memory that is there in two ways. `from_dlpack` first allocates as much memory again,
// zeroes it and throws it away: 250 us for 1024 x 896 in bfloat16. `from_numpy` does not, and takes 0.6 us. It asks its
// argument for a buffer by Python's buffer protocol and keeps that until the last tensor over it dies. So its argument
// here is one array, made once, of a subclass of ndarray that hands out a buffer of ours each time it is asked; the
// format "E" says bfloat16 to MindSpore, which NumPy's own arrays cannot. (MindSpore 2.10.0.)

thread_local Buffer* pending = nullptr;  // what the exporter hands out next

int export_buffer(PyObject* self, Py_buffer* view, int) {
  static const char* const kFormats[] = {"f", "E", "e", "i", "l", "b"};
  if (!pending) return PyErr_SetString(PyExc_BufferError, "There is no buffer to hand out."), -1;
  Buffer* buffer = pending;
  pending = nullptr;
  view->obj = Py_NewRef(self);
  view->buf = buffer->data;
  view->len = Py_ssize_t(buffer->bytes);
  view->itemsize = dtype_size(buffer->dtype);
  view->readonly = 0;
  view->format = const_cast<char*>(kFormats[buffer->dtype]);
  view->ndim = buffer->dimensions;
  view->shape = buffer->shape;
  view->strides = buffer->strides;
  view->suboffsets = nullptr;
  view->internal = buffer;
  return 0;
}

void release_buffer(PyObject*, Py_buffer* view) { recycle(static_cast<Buffer*>(view->internal)); }

// The exporter: an empty array to everybody who does not ask for its buffer.
PyObject* new_exporter(PyObject* ndarray) {
  static PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(export_buffer)},
                                {Py_bf_releasebuffer, reinterpret_cast<void*>(release_buffer)},
                                {0, nullptr}};
  static PyType_Spec spec = {"_vllm_ms_cpu.Exporter", 0, 0, Py_TPFLAGS_DEFAULT, slots};
  PyObject* type = PyType_FromSpecWithBases(&spec, ndarray);
  PyObject* exporter = type ? PyObject_CallFunction(type, "(i)s", 0, "int16") : nullptr;
  Py_XDECREF(type);
  return exporter;
}

// A new MindSpore tensor; `data` is where its values are.
PyObject* make_tensor(int dtype, int dimensions, const int64_t* shape, void** data, bool zeroed = false) {
  Buffer* buffer = pending = new_buffer(dtype, dimensions, shape, zeroed);
  if (!buffer) return PyErr_NoMemory();
  *data = buffer->data;
  PyObject* tensor = PyObject_CallOneArg(mindspore.from_numpy, mindspore.exporter);
  if (!pending) return tensor;
  recycle(pending);
  pending = nullptr;
  if (tensor) PyErr_SetString(PyExc_RuntimeError, "MindSpore did not ask for the buffer of a new tensor.");
  Py_XDECREF(tensor);
  return nullptr;
}

PyObject* make_like(const Tensor& tensor, void** data) {
  return make_tensor(tensor.dtype, tensor.dimensions, tensor.shape, data);
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

// --- MindSpore ------------------------------------------------------------------------------------------------------

// connect(tensor class, dtypes in the order of DType, numpy.ndarray)
PyObject* connect(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 3)) return nullptr;
  struct {
    const char* name;
    PyObject** to;
  } wanted[] = {{"from_numpy", &mindspore.from_numpy},
                {"_dtype", &mindspore.dtype},
                {"_shape", &mindspore.shape},
                {"is_contiguous", &mindspore.is_contiguous},
                {"_data_ptr", &mindspore.data_ptr}};
  for (auto& attribute : wanted)
    if (!(*attribute.to = PyObject_GetAttrString(objects[0], attribute.name))) return nullptr;
  for (PyObject* getter : {mindspore.dtype, mindspore.shape})
    if (!Py_TYPE(getter)->tp_descr_get) return PyErr_Format(PyExc_TypeError, "%R is not a getter", getter);
  if (!(mindspore.exporter = new_exporter(objects[2]))) return nullptr;
  mindspore.type = reinterpret_cast<PyTypeObject*>(Py_NewRef(objects[0]));
  for (int code = 0; code < kDTypes; ++code)
    if (!(mindspore.dtypes[code] = PySequence_GetItem(objects[1], code))) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace
}  // namespace vllm_ms
