// The choice of the ISA tier, and the Python module llmrt._C.
#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>
#include <stdexcept>
#include <string>

#include "tier.h"

namespace llmrt {
namespace {

const Tier* const kTiers[] = {&tier_avx512_bf16, &tier_avx512_vnni, &tier_avx2};  // best first

struct Cpu {
  bool avx2 = false, avx512_vnni = false, avx512_bf16 = false;
};

// What both the CPU and the operating system (XCR0: saved register state) support.
Cpu detect() {
  Cpu cpu;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool fma = c & (1u << 12), osxsave = c & (1u << 27), f16c = c & (1u << 29);
  if (!osxsave) return cpu;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 6) == 6, zmm = (low & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  cpu.avx2 = ymm && fma && f16c && (b & (1u << 5));
  const bool f = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31), vnni = c & (1u << 11);
  cpu.avx512_vnni = cpu.avx2 && zmm && f && dq && bw && vl && vnni;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx512_bf16 = cpu.avx512_vnni && (a & (1u << 5));
  return cpu;
}

bool supported(const Tier* t) {
  static const Cpu cpu = detect();
  if (t == &tier_avx512_bf16) return cpu.avx512_bf16;
  if (t == &tier_avx512_vnni) return cpu.avx512_vnni;
  return cpu.avx2;
}

std::string supported_names() {
  std::string names;
  for (const Tier* t : kTiers)
    if (supported(t)) names += (names.empty() ? "" : ", ") + std::string(t->name);
  return names + (names.empty() ? "" : ", ") + "reference";
}

// Returns false where the name is unknown or the CPU lacks the tier.
bool find(const char* name, const Tier*& found) {
  found = nullptr;
  if (!strcmp(name, "reference")) return true;
  for (const Tier* t : kTiers)
    if (!strcmp(name, t->name) && supported(t)) found = t;
  return found;
}

// A function, as operators are registered before this file's own globals exist.
std::string& start_error() {
  static std::string text;
  return text;
}

const Tier* choose() {
  const char* name = getenv("LLMRT_CPU_ISA");
  const Tier* found = nullptr;
  if (name && *name) {
    if (!find(name, found)) start_error() = "LLMRT_CPU_ISA=" + std::string(name) + "; valid here: " + supported_names();
    return found;
  }
  for (const Tier* t : kTiers)
    if (supported(t)) return t;
  return nullptr;
}

const Tier*& current() {
  static const Tier* t = choose();
  return t;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(current() ? current()->name : "reference"); }

PyObject* isas(PyObject*, PyObject*) { return PyUnicode_FromString(supported_names().c_str()); }

PyObject* force_isa(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (!bytes) return nullptr;
  const std::string name = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  const Tier* found;
  if (!find(name.c_str(), found) || !found || !current())
    return PyErr_Format(PyExc_ValueError, "cannot switch to ISA tier '%s'; valid here: %s", name.c_str(),
                        supported_names().c_str());
  current() = found;
  Py_RETURN_NONE;
}

PyObject* peak(PyObject*, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"kind", "threads", "seconds", nullptr};
  const char* kind;
  long long threads;
  double seconds, result = 0;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "sLd", const_cast<char**>(names), &kind, &threads, &seconds))
    return nullptr;
  std::string invalid;
  bool no_memory = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    result = measure_peak(kind, threads, seconds);
  } catch (const std::invalid_argument& e) {
    invalid = e.what();
  } catch (const std::bad_alloc&) {
    no_memory = true;
  }
  Py_END_ALLOW_THREADS;
  if (!invalid.empty()) return PyErr_Format(PyExc_ValueError, "%s", invalid.c_str());
  if (no_memory) return PyErr_NoMemory();
  return PyFloat_FromDouble(result);
}

PyMethodDef methods[] = {
    {"cpu_isa", isa, METH_NOARGS, "The ISA tier in use, or 'reference'."},
    {"cpu_isas", isas, METH_NOARGS, "The ISA tiers that this CPU supports, best first, comma separated."},
    {"force_cpu_isa", force_isa, METH_O, "Switch to another supported tier (packed weights fit every tier)."},
    {"measure_peak", (PyCFunction)(void (*)(void))peak, METH_VARARGS | METH_KEYWORDS,
     "measure_peak(kind, threads, seconds): int8, bf16 or fp32 operations per second, or bytes read per second."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const Tier* current_tier() { return current(); }

}  // namespace llmrt

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  llmrt::current_tier();
  if (!llmrt::start_error().empty()) return PyErr_Format(PyExc_ImportError, "%s", llmrt::start_error().c_str());
  return PyModule_Create(&llmrt::module);
}
