// The Python module: choice of the instruction set, and a thin binding.
//
// Python calls a kernel with integers: addresses from `tensor.data_ptr()` (0.3 us), sizes and dtype codes. Shapes and
// dtypes were checked there. A call costs about 0.2 us here, plus 1.5 us per returned tensor (memory.cpp). There is no
// pybind11 and no MindSpore header: the compiled module depends on the Python ABI alone. MindSpore must not have queued
// operators on the same tensors (its launches are blocking in this package).
//
// Functions with a plain C++ signature are bound by `bind<f>`, which unpacks the arguments by their types, releases the
// GIL during the call, and raises ValueError if the result is a message. Those that make tensors are written out.
//
// Each instruction set is a complete set of kernels in a namespace of its own. `kernels(name)` returns a module whose
// functions carry that set as their `self`: objects that use different sets do not disturb each other.

#include "binding.h"

#include <cstring>
#include <tuple>
#include <utility>

#include "threads.h"

namespace vllm_ms {

#if defined(__x86_64__)
#define VLLM_MS_EACH_ISA(X) X(avx512_bf16) X(avx512) X(avx2) X(portable)
#else
#define VLLM_MS_EACH_ISA(X) X(portable)
#endif

#define X(isa)            \
  namespace isa {         \
  VLLM_MS_DECLARE_KERNELS \
  }
VLLM_MS_EACH_ISA(X)
#undef X

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  Functions functions;
};

#if defined(__x86_64__)
// The builtins ask CPUID and whether the operating system saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool has_portable() { return true; }

#define X(isa)                                                                                                     \
  {#isa,                                                                                                           \
   has_##isa,                                                                                                      \
   {isa::pack_rows, isa::embedding, isa::linear, isa::rms_norm, isa::add_rms_norm, isa::gate_and_mul, isa::rotary, \
    isa::write_kv, isa::attention}},
const Isa kIsas[] = {VLLM_MS_EACH_ISA(X)};  // best first
#undef X

constexpr const char* kIsaCapsule = "vllm_ms_isa";

// The kernels of the instruction set a function was bound to.
const Functions& functions(PyObject* self) {
  return static_cast<const Isa*>(PyCapsule_GetPointer(self, kIsaCapsule))->functions;
}

// --- binding ---

template <class... Arguments, size_t... I>
PyObject* call(const char* (*function)(const Functions&, Arguments...), const Functions& kernels,
               PyObject* const* objects, std::index_sequence<I...>) {
  std::tuple<std::decay_t<Arguments>...> values;
  (unpack(objects[I], std::get<I>(values)), ...);
  if (PyErr_Occurred()) return nullptr;
  const char* message;
  Py_BEGIN_ALLOW_THREADS message = function(kernels, std::get<I>(values)...);
  Py_END_ALLOW_THREADS return result(message);
}

template <class... Arguments>
PyObject* call(const char* (*function)(const Functions&, Arguments...), const Functions& kernels,
               PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, sizeof...(Arguments))) return nullptr;
  return call(function, kernels, objects, std::index_sequence_for<Arguments...>());
}

template <auto function>
PyObject* bind(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  return call(function, functions(self), objects, count);
}

// empty(dtype, shape) -> tensor
PyObject* empty(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  int64_t shape[kMaxDimensions];
  void* data;
  if (!expect(count, 2)) return nullptr;
  int dimensions = read_shape(objects[1], shape);
  return dimensions < 0 ? nullptr : make_tensor(int(PyLong_AsLong(objects[0])), dimensions, shape, &data);
}

// --- weights --------------------------------------------------------------------------------------------------------

void delete_packed(PyObject* capsule) { delete static_cast<Packed*>(PyCapsule_GetPointer(capsule, nullptr)); }

// new_weight(dtype, in_features, sizes) -> (tensor, address of the Packed, capsule that keeps it)
PyObject* new_weight(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 3)) return nullptr;
  PyObject* sizes = objects[2];
  if (!PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) > kMaxParts)
    return PyErr_Format(PyExc_ValueError, "A fused weight has at most %d parts.", kMaxParts);
  Packed* weight = new Packed;
  PyObject* capsule = PyCapsule_New(weight, nullptr, delete_packed);
  weight->dtype = int(PyLong_AsLong(objects[0]));
  weight->in_features = PyLong_AsLong(objects[1]);
  weight->parts = int(PyTuple_GET_SIZE(sizes));
  const bool pairs = weight->dtype == kBfloat16;
  const long steps = pairs ? (weight->in_features + 1) / 2 : weight->in_features;
  weight->panel_bytes = steps * 16 * (pairs ? 4 : dtype_size(weight->dtype));
  if (weight->parts == 2 && PyLong_AsLong(PyTuple_GET_ITEM(sizes, 0)) == PyLong_AsLong(PyTuple_GET_ITEM(sizes, 1)))
    weight->panel_step = 2;
  for (int i = 0; i < weight->parts; ++i) {
    weight->size[i] = PyLong_AsLong(PyTuple_GET_ITEM(sizes, i));
    weight->first_panel[i] = weight->panel_step == 1 ? weight->panels : i;
    weight->first_row[i] = weight->out_features;
    weight->panels += (weight->size[i] + 15) / 16;
    weight->out_features += weight->size[i];
  }
  const int64_t shape[] = {weight->panels, steps, pairs ? 32 : 16};
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_tensor(weight->dtype, 3, shape, &weight->data, true);
  if (!tensor) return Py_DECREF(capsule), nullptr;
  return Py_BuildValue("(NNN)", tensor, PyLong_FromVoidPtr(weight), capsule);
}

// load_rows(weight, part, first_row, source, dtype, rows, stride)
const char* load_rows(const Functions& kernels, const Packed* weight, int part, long first_row, const void* source,
                      int dtype, long rows, long stride) {
  return kernels.pack_rows(*weight, part, first_row, source, dtype, rows, stride);
}

// embedding(weight, ids, wide, count, first_row) -> tensor
PyObject* embedding(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const Packed* weight;
  const void* ids;
  bool wide;
  long tokens, first_row;
  if (!expect(count, 5)) return nullptr;
  unpack(objects[0], weight), unpack(objects[1], ids), unpack(objects[2], wide);
  unpack(objects[3], tokens), unpack(objects[4], first_row);
  if (PyErr_Occurred()) return nullptr;
  const int64_t shape[] = {tokens, weight->in_features};
  void* out;
  PyObject* tensor = make_tensor(weight->dtype, 2, shape, &out);
  return fill(tensor, [&] { return functions(self).embedding(*weight, ids, wide, tokens, first_row, out); });
}

bool read_linear(LinearCall& call, PyObject* const* objects, Py_ssize_t count) {
  if (!expect(count, 6)) return false;
  unpack(objects[0], call.weight), unpack(objects[1], call.x), unpack(objects[2], call.x_dtype);
  unpack(objects[3], call.rows), unpack(objects[4], call.bias), unpack(objects[5], call.out.dtype);
  call.gate = Gate::kNone;
  return !PyErr_Occurred();
}

// linear(weight, x, x_dtype, rows, bias or 0, dtype) -> tensor [rows, out_features]
PyObject* linear(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  LinearCall call;
  if (!read_linear(call, objects, count)) return nullptr;
  const Packed& weight = *call.weight;
  const int64_t shape[] = {call.rows, weight.out_features};
  void* out;
  PyObject* tensor = make_tensor(call.out.dtype, 2, shape, &out);
  for (int i = 0; tensor && i < weight.parts; ++i) {
    call.out.data[i] = static_cast<char*>(out) + weight.first_row[i] * dtype_size(call.out.dtype);
    call.out.stride[i] = weight.out_features;
  }
  return fill(tensor, [&] { return functions(self).linear(call); });
}

// linear_split(as linear) -> tuple of tensors [rows, sizes[i]]
PyObject* linear_split(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  LinearCall call;
  if (!read_linear(call, objects, count)) return nullptr;
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

// linear_gated(as linear, activation) -> tensor [rows, sizes[0]]; the weight has two parts of one size
PyObject* linear_gated(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  LinearCall call;
  if (!read_linear(call, objects, count - 1)) return nullptr;
  unpack(objects[6], call.gate);
  const int64_t shape[] = {call.rows, call.weight->size[0]};
  PyObject* tensor = make_tensor(call.out.dtype, 2, shape, &call.out.data[0]);
  call.out.stride[0] = shape[1];
  return fill(tensor, [&] { return functions(self).linear(call); });
}

// --- elementwise ----------------------------------------------------------------------------------------------------

// A result of the shape in `tuple`; `rows` and `features` describe it as a matrix.
PyObject* make_like(PyObject* tuple, int dtype, void** out, long& rows, long& features) {
  int64_t shape[kMaxDimensions];
  int dimensions = read_shape(tuple, shape);
  if (dimensions < 0) return nullptr;
  rows = 1;
  for (int i = 0; i + 1 < dimensions; ++i) rows *= shape[i];
  features = dimensions ? shape[dimensions - 1] : 1;
  return make_tensor(dtype, dimensions, shape, out);
}

// rms_norm(x, residual or 0, shape, dtype, weight, eps) -> tensor
PyObject* rms_norm(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const void* x;
  void *residual, *out;
  const float* weight;
  int dtype;
  double eps;
  long rows, features;
  if (!expect(count, 6)) return nullptr;
  unpack(objects[0], x), unpack(objects[1], residual), unpack(objects[3], dtype);
  unpack(objects[4], weight), unpack(objects[5], eps);
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(objects[2], dtype, &out, rows, features);
  const Functions& f = functions(self);
  return fill(tensor, [&] {
    return residual ? f.add_rms_norm(x, residual, weight, out, dtype, rows, features, eps)
                    : f.rms_norm(x, weight, out, dtype, rows, features, eps);
  });
}

// gate_and_mul(gate, up, shape, dtype, kind) -> tensor
PyObject* gate_and_mul(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const void *gate, *up;
  void* out;
  int dtype;
  Gate kind;
  long rows, features;
  if (!expect(count, 5)) return nullptr;
  unpack(objects[0], gate), unpack(objects[1], up), unpack(objects[3], dtype), unpack(objects[4], kind);
  PyObject* tensor = PyErr_Occurred() ? nullptr : make_like(objects[2], dtype, &out, rows, features);
  return fill(tensor, [&] { return functions(self).gate_and_mul(gate, up, out, dtype, rows * features, kind); });
}

// --- attention ------------------------------------------------------------------------------------------------------

const char* rotary(const Functions& kernels, void* query, void* key, int dtype, long tokens, long query_heads,
                   long key_heads, long head_size, const int64_t* positions, const float* cos_sin, long max_position,
                   long rotary_size, bool interleaved) {
  return kernels.rotary({query, key, dtype, tokens, query_heads, key_heads, head_size, positions, cos_sin, max_position,
                         rotary_size, interleaved});
}

const char* write_kv(const Functions& kernels, const void* key, const void* value, void* cache, int dtype, long tokens,
                     long num_blocks, long kv_heads, long block_size, long head_size, const int64_t* slots) {
  return kernels.write_kv({key, value, cache, dtype, tokens, kv_heads, head_size, num_blocks, block_size, slots});
}

// attention(query, query shape, dtype, cache, cache shape, query_start, seq_lens, block_tables, sequences,
// table_stride,
//           scale, soft_cap or 0, window or 0, causal) -> tensor like query
PyObject* attention(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  AttentionCall call;
  int64_t cache[kMaxDimensions];
  long features;
  if (!expect(count, 14)) return nullptr;
  unpack(objects[0], call.query), unpack(objects[2], call.dtype), unpack(objects[3], call.cache);
  unpack(objects[5], call.query_start), unpack(objects[6], call.seq_lens), unpack(objects[7], call.block_tables);
  unpack(objects[8], call.sequences), unpack(objects[9], call.table_stride), unpack(objects[10], call.scale);
  unpack(objects[11], call.soft_cap), unpack(objects[12], call.window), unpack(objects[13], call.causal);
  if (PyErr_Occurred() || read_shape(objects[4], cache) < 0) return nullptr;
  PyObject* tensor = make_like(objects[1], call.dtype, &call.out, call.tokens, features);
  call.num_blocks = cache[0], call.kv_heads = cache[2], call.block_size = cache[3], call.head_size = cache[4];
  call.heads = features / call.head_size;
  return fill(tensor, [&] { return functions(self).attention(call); });
}

// --- the module -----------------------------------------------------------------------------------------------------

// isas() -> names of the instruction sets this machine runs, best first
PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Isa& isa : kIsas)
    if (names && isa.supported()) {
      PyObject* name = PyUnicode_FromString(isa.name);
      if (!name || PyList_Append(names, name) != 0) Py_CLEAR(names);
      Py_XDECREF(name);
    }
  return names;
}

// set_importer(function): how a DLPack capsule becomes a MindSpore tensor
PyObject* set_importer(PyObject*, PyObject* function) {
  Py_INCREF(function);
  Py_XSETREF(import_tensor, function);
  Py_RETURN_NONE;
}

PyObject* threads(PyObject*, PyObject*) { return PyLong_FromLong(thread_count()); }
PyObject* recycled(PyObject*, PyObject*) { return PyLong_FromSize_t(recycled_bytes()); }

// Calls a function of one whole number.
template <class Number>
PyObject* set_number(void (*function)(Number), PyObject* number) {
  long value = PyLong_AsLong(number);
  if (PyErr_Occurred()) return nullptr;
  function(Number(value));
  Py_RETURN_NONE;
}
PyObject* set_threads(PyObject*, PyObject* number) { return set_number(set_thread_count, number); }
PyObject* limit_threads(PyObject*, PyObject* number) { return set_number(set_thread_limit, number); }
PyObject* limit_recycling(PyObject*, PyObject* number) { return set_number(set_recycling_limit, number); }

#define FAST(name, function) \
  {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr}
PyMethodDef kKernels[] = {
    FAST("load_rows", bind<load_rows>), FAST("embedding", embedding), FAST("linear", linear),
    FAST("linear_split", linear_split), FAST("linear_gated", linear_gated), FAST("rms_norm", rms_norm),
    FAST("gate_and_mul", gate_and_mul), FAST("rotary", bind<rotary>), FAST("write_kv", bind<write_kv>),
    FAST("attention", attention),
};

// kernels(name) -> module of the kernels for an instruction set
PyObject* kernels(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8(name);
  if (!wanted) return nullptr;
  for (const Isa& isa : kIsas) {
    if (!isa.supported() || strcmp(isa.name, wanted) != 0) continue;
    PyObject* self = PyCapsule_New(const_cast<Isa*>(&isa), kIsaCapsule, nullptr);
    PyObject* module = PyModule_New(isa.name);
    bool good = self && module;
    for (PyMethodDef& method : kKernels) {
      PyObject* function = good ? PyCFunction_New(&method, self) : nullptr;
      good = function && PyModule_AddObjectRef(module, method.ml_name, function) == 0;
      Py_XDECREF(function);
    }
    Py_XDECREF(self);
    if (!good) Py_CLEAR(module);
    return module;
  }
  return PyErr_Format(PyExc_ValueError, "This machine does not run the instruction set %s.", wanted);
}

PyMethodDef kMethods[] = {
    {"isas", isas, METH_NOARGS, nullptr},
    {"kernels", kernels, METH_O, nullptr},
    {"set_importer", set_importer, METH_O, nullptr},
    {"threads", threads, METH_NOARGS, nullptr},
    {"set_threads", set_threads, METH_O, nullptr},
    {"set_thread_limit", limit_threads, METH_O, nullptr},
    {"recycled_bytes", recycled, METH_NOARGS, nullptr},
    {"set_recycling_limit", limit_recycling, METH_O, nullptr},
    FAST("empty", empty),
    FAST("new_weight", new_weight),
    {nullptr, nullptr, 0, nullptr},
};
#undef FAST

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_vllm_ms_cpu", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace vllm_ms

PyMODINIT_FUNC PyInit__vllm_ms_cpu() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  return PyModule_Create(&vllm_ms::kModule);
}
