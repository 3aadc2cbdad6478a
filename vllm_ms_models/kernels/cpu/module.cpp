// The Python module: choice of the instruction set, and a thin binding.
//
// Python passes MindSpore's tensors as they are; calls.h says what happens to them. There is no pybind11 and no
// MindSpore header: the compiled module depends on the Python ABI alone. MindSpore must not have queued operators on
// the same tensors (its launches are blocking in this package).
//
// Each instruction set is a complete set of kernels in a namespace of its own. `kernels(name)` returns a module whose
// functions carry that set as their `self`: objects that use different sets do not disturb each other.

#include <cstring>

#include "calls_collectives.h"
#include "calls_experts.h"
#include "calls_prefill.h"
#include "threads.h"
#include "weights.h"

namespace vllm_ms {

#if defined(__x86_64__)
#define VLLM_MS_EACH_ISA(X) X(avx512_bf16) X(avx512_vnni) X(avx512) X(avx2) X(portable)
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
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool has_portable() { return true; }

#define X(isa)                                                                                                     \
  {#isa,                                                                                                           \
   has_##isa,                                                                                                      \
   {isa::pack_rows, isa::embedding, isa::linear, isa::reduce, isa::experts, isa::rms_norm, isa::add_rms_norm, \
    isa::layer_norm, isa::add_layer_norm, isa::activate, isa::gate_and_mul,                                        \
    isa::rotary, isa::write_kv, isa::attention, isa::add_parts}},
const Isa kIsas[] = {VLLM_MS_EACH_ISA(X)};  // best first
#undef X

constexpr const char* kIsaCapsule = "vllm_ms_isa";

// The kernels of the instruction set a function was bound to.
const Functions& functions(PyObject* self) {
  return static_cast<const Isa*>(PyCapsule_GetPointer(self, kIsaCapsule))->functions;
}

// empty(dtype, shape) -> tensor
PyObject* empty(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  int64_t shape[kMaxDimensions];
  void* data;
  if (!expect(count, 2)) return nullptr;
  int dimensions = read_shape(objects[1], shape);
  return dimensions < 0 ? nullptr : make_tensor(int(PyLong_AsLong(objects[0])), dimensions, shape, &data);
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
    FAST("load_rows", load_rows),       FAST("embedding", embedding),       FAST("linear", linear),
    FAST("linear_split", linear_split), FAST("linear_gated", linear_gated), FAST("rms_norm", rms_norm),
    FAST("add_rms_norm", add_rms_norm), FAST("gate_and_mul", gate_and_mul), FAST("rotary", rotary),
    FAST("write_kv", write_kv),         FAST("attention", attention),       FAST("experts", experts),
    FAST("linear_heads", linear_heads), FAST("write_latent", write_latent), FAST("mla_attention", mla_attention),
    FAST("mla_prefill", mla_prefill),   FAST("join_ranks", join_ranks),     FAST("all_reduce", all_reduce),
    FAST("all_gather", all_gather),     FAST("all_to_all", all_to_all),     FAST("reduce_scatter", reduce_scatter),
    FAST("broadcast", broadcast),       {"barrier", barrier, METH_O, nullptr},
    FAST("reduce", reduce),             FAST("layer_norm", layer_norm),     FAST("activate", activate),
    FAST("add_layer_norm", add_layer_norm), {"new_shared_memory", new_shared_memory, METH_O, nullptr},
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
    {"threads", threads, METH_NOARGS, nullptr},
    {"set_threads", set_threads, METH_O, nullptr},
    {"set_thread_limit", limit_threads, METH_O, nullptr},
    {"recycled_bytes", recycled, METH_NOARGS, nullptr},
    {"set_recycling_limit", limit_recycling, METH_O, nullptr},
    FAST("connect", connect),
    FAST("empty", empty),
    FAST("new_weight", new_weight),
    FAST("new_integer_weight", new_integer_weight),
    FAST("load_integers", load_integers),
    FAST("load_scales", load_scales),
    FAST("set_input", set_input),
    FAST("widen_float8", widen_float8),
    FAST("round_rows", round_rows),
    FAST("choose_experts", choose_experts),
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
