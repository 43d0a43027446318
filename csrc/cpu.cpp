// The choice of the ISA tier, and the Python module llmrt._C.
#include <cpuid.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "tier.h"

namespace llmrt {
namespace {

// The words of CPUID (leaf 1 and leaf 7, subleaves 0 and 1) and XCR0, the register state that the system saves; 0 where
// the CPU has no such leaf.
struct Cpu {
  unsigned leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, xcr0;
};

constexpr unsigned bit(int i) { return 1u << i; }
constexpr Cpu operator|(const Cpu& a, const Cpu& b) {
  return {a.leaf1_ecx | b.leaf1_ecx, a.leaf7_ebx | b.leaf7_ebx,     a.leaf7_ecx | b.leaf7_ecx,
          a.leaf7_edx | b.leaf7_edx, a.leaf7_1_eax | b.leaf7_1_eax, a.xcr0 | b.xcr0};
}

// FMA, OSXSAVE, F16C; AVX2; xmm and ymm registers.
constexpr Cpu kAvx2 = {bit(12) | bit(27) | bit(29), bit(5), 0, 0, 0, bit(1) | bit(2)};
constexpr Cpu kAvxVnni = kAvx2 | Cpu{0, 0, 0, 0, bit(4), 0};
// F, DQ, BW, VL; VNNI; mask and zmm registers.
constexpr Cpu kAvx512Vnni =
    kAvx2 | Cpu{0, bit(16) | bit(17) | bit(30) | bit(31), bit(11), 0, 0, bit(5) | bit(6) | bit(7)};
constexpr Cpu kAvx512Bf16 = kAvx512Vnni | Cpu{0, 0, 0, 0, bit(5), 0};
// BF16, TILE, INT8; tile registers.
constexpr unsigned kTileState = bit(17) | bit(18);
constexpr Cpu kAmx = kAvx512Bf16 | Cpu{0, 0, 0, bit(22) | bit(24) | bit(25), 0, kTileState};

struct Row {  // of the tiers, best first
  const Tier* tier;
  Cpu needs;
};
constexpr Row kTiers[] = {{&tier_amx, kAmx},
                          {&tier_avx512_bf16, kAvx512Bf16},
                          {&tier_avx512_vnni, kAvx512Vnni},
                          {&tier_avx_vnni, kAvxVnni},
                          {&tier_avx2, kAvx2}};

bool has(const Cpu& cpu, const Cpu& needs) {
  const Cpu both = cpu | needs;
  return both.leaf1_ecx == cpu.leaf1_ecx && both.leaf7_ebx == cpu.leaf7_ebx && both.leaf7_ecx == cpu.leaf7_ecx &&
         both.leaf7_edx == cpu.leaf7_edx && both.leaf7_1_eax == cpu.leaf7_1_eax && both.xcr0 == cpu.xcr0;
}

// Linux gives a process tile registers only when it asks; false where it refuses.
bool ask_for_tile_registers() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h; bit of XCR0
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Cpu detect() {
  Cpu cpu{};
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  cpu.leaf1_ecx = c;
  if (!(c & bit(27))) return cpu;  // OSXSAVE: without it there is no xgetbv
  __asm__ volatile("xgetbv" : "=a"(cpu.xcr0), "=d"(d) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  cpu.leaf7_ebx = b, cpu.leaf7_ecx = c, cpu.leaf7_edx = d;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.leaf7_1_eax = a;
  if (has(cpu, kAmx) && !ask_for_tile_registers()) cpu.xcr0 &= ~kTileState;
  return cpu;
}

const Cpu& this_cpu() {
  static const Cpu cpu = detect();
  return cpu;
}

std::string supported_names(const Cpu& cpu) {
  std::string names;
  for (const Row& row : kTiers)
    if (has(cpu, row.needs)) names += std::string(row.tier->name) + ", ";
  return names + "reference";
}

// Tiers out of other shared objects: never chosen, only forced by name.
std::vector<const Tier*>& added() {
  static std::vector<const Tier*> tiers;
  return tiers;
}

// Returns false where the name is unknown or the CPU lacks the tier.
bool find(const char* name, const Tier*& found) {
  found = nullptr;
  if (!strcmp(name, "reference")) return true;
  for (const Row& row : kTiers)
    if (!strcmp(name, row.tier->name) && has(this_cpu(), row.needs)) found = row.tier;
  for (const Tier* tier : added())
    if (!strcmp(name, tier->name)) found = tier;
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
    if (!find(name, found)) {
      bool known = false;
      for (const Row& row : kTiers) known = known || !strcmp(name, row.tier->name);
      start_error() = "LLMRT_CPU_ISA=" + std::string(name) + (known ? ", which this CPU or system lacks" : "") +
                      "; valid here: " + supported_names(this_cpu());
    }
    return found;
  }
  for (const Row& row : kTiers)
    if (has(this_cpu(), row.needs)) return row.tier;
  return nullptr;
}

const Tier*& current() {
  static const Tier* t = choose();
  return t;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(current() ? current()->name : "reference"); }

PyObject* isas(PyObject*, PyObject*) { return PyUnicode_FromString(supported_names(this_cpu()).c_str()); }

PyObject* compiled_isas(PyObject*, PyObject*) {
  return PyUnicode_FromString(supported_names({~0u, ~0u, ~0u, ~0u, ~0u, ~0u}).c_str());
}

PyObject* isas_of(PyObject*, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"leaf1_ecx", "leaf7_ebx", "leaf7_ecx", "leaf7_edx", "leaf7_1_eax", "xcr0", nullptr};
  Cpu cpu{};
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "$IIIIII", const_cast<char**>(names), &cpu.leaf1_ecx, &cpu.leaf7_ebx,
                                   &cpu.leaf7_ecx, &cpu.leaf7_edx, &cpu.leaf7_1_eax, &cpu.xcr0))
    return nullptr;
  return PyUnicode_FromString(supported_names(cpu).c_str());
}

PyObject* force_isa(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (!bytes) return nullptr;
  const std::string name = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  const Tier* found;
  if (!find(name.c_str(), found) || !found || !current())
    return PyErr_Format(PyExc_ValueError, "cannot switch to ISA tier '%s'; valid here: %s", name.c_str(),
                        supported_names(this_cpu()).c_str());
  current() = found;
  Py_RETURN_NONE;
}

PyObject* add_isa(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (!bytes) return nullptr;
  const std::string path = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) return PyErr_Format(PyExc_ValueError, "path is '%s': %s", path.c_str(), dlerror());
  const auto get = (const Tier* (*)(size_t))dlsym(library, "llmrt_tier");
  const Tier* tier = get ? get(sizeof(Tier)) : nullptr;
  if (!tier)
    return PyErr_Format(PyExc_ValueError, "path is '%s': no llmrt_tier built from these sources", path.c_str());
  added().push_back(tier);
  return PyUnicode_FromString(tier->name);
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
    {"compiled_cpu_isas", compiled_isas, METH_NOARGS,
     "The ISA tiers that are compiled in, best first, comma separated."},
    {"cpu_isas_of", (PyCFunction)(void (*)(void))isas_of, METH_VARARGS | METH_KEYWORDS,
     "cpu_isas_of(*, leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, xcr0): as cpu_isas, of the CPU with "
     "these "
     "CPUID words and this XCR0."},
    {"force_cpu_isa", force_isa, METH_O, "Switch to another supported tier (packed weights fit every tier)."},
    {"add_cpu_isa", add_isa, METH_O,
     "Load the tier of a shared object, which only force_cpu_isa chooses (tests: emulated instructions); its name."},
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
