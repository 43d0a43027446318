// Host side of the SYCL kernels: builds bundles from source text and launches kernels by name, over raw pointers. It
// includes no header of torch, so that one build serves every torch; the queue is torch's own
// (torch.xpu.Stream.sycl_queue) or one on SYCL's CPU device.
// (sycl/sycl.hpp, which has all of SYCL, would take a compiler twice as long.)
#include <cstdint>
#include <cstring>
#include <string>
#include <sycl/device_selector.hpp>
#include <sycl/ext/oneapi/experimental/raw_kernel_arg.hpp>
#include <sycl/ext/oneapi/properties/properties.hpp>
#include <sycl/handler.hpp>
#include <sycl/kernel_bundle.hpp>
#include <sycl/properties/queue_properties.hpp>
#include <sycl/queue.hpp>
#include <vector>

namespace syclex = sycl::ext::oneapi::experimental;
using Bundle = sycl::kernel_bundle<sycl::bundle_state::executable>;

namespace {

thread_local std::string error;

// Runs a function; a C++ exception becomes the text of llmrt_error and the result a null pointer or zero.
template <typename F>
auto guarded(F&& function) -> decltype(function()) {
  try {
    error.clear();
    return function();
  } catch (const std::exception& e) {
    error = e.what();
  } catch (...) {
    error = "unknown C++ exception";
  }
  return {};
}

std::vector<std::string> lines(const char* text) {
  std::vector<std::string> out;
  for (const char* end; (end = std::strchr(text, '\n')); text = end + 1) out.emplace_back(text, end);
  return out;
}

}  // namespace

extern "C" {

const char* llmrt_error() { return error.c_str(); }

void* llmrt_cpu_queue() {
  return guarded([]() -> void* { return new sycl::queue(sycl::cpu_selector_v, sycl::property::queue::in_order{}); });
}

// Name of the queue's device and its sub-group sizes, for people.
const char* llmrt_describe(void* queue) {
  static thread_local std::string text;
  return guarded([&]() -> const char* {
    const sycl::device device = static_cast<sycl::queue*>(queue)->get_device();
    text = device.get_info<sycl::info::device::name>() + ", sub-groups of";
    for (size_t size : device.get_info<sycl::info::device::sub_group_sizes>()) text += " " + std::to_string(size);
    return text.c_str();
  });
}

// source: SYCL text. headers: pairs of name and text. options, kernels: one a line, each line ended. Returns a bundle.
void* llmrt_build(void* queue, const char* source, const char* const* headers, int header_count, const char* options,
                  const char* kernels) {
  std::string log;
  void* result = guarded([&]() -> void* {
    syclex::include_files files;
    for (int i = 0; i < header_count; i++) files.add(headers[2 * i], headers[2 * i + 1]);
    auto text = syclex::create_kernel_bundle_from_source(static_cast<sycl::queue*>(queue)->get_context(),
                                                         syclex::source_language::sycl, std::string(source),
                                                         syclex::properties{files});
    return new Bundle(
        syclex::build(text, syclex::properties{syclex::build_options{lines(options)}, syclex::save_log{&log},
                                               syclex::registered_names{lines(kernels)}}));
  });
  if (!result && !log.empty()) error += "\n" + log;
  return result;
}

void* llmrt_kernel(void* bundle, const char* name) {
  return guarded(
      [&]() -> void* { return new sycl::kernel(static_cast<Bundle*>(bundle)->ext_oneapi_get_kernel(name)); });
}

// range: global sizes [3], local sizes [3]. args: the bytes of the arguments one after the other. kinds: of each, p
// pointer, q int64_t, f float. Returns 1, or 0 on an error.
int llmrt_launch(void* queue, void* kernel, const size_t* range, const char* args, const char* kinds, int wait) {
  return guarded([&]() -> int {
    auto& q = *static_cast<sycl::queue*>(queue);
    sycl::event done = q.submit([&](sycl::handler& h) {
      for (int i = 0; kinds[i]; i++) {
        const size_t size = kinds[i] == 'f' ? sizeof(float) : sizeof(int64_t);
        if (kinds[i] == 'p') {
          void* pointer;
          std::memcpy(&pointer, args, sizeof pointer);
          h.set_arg(i, pointer);
        } else {
          h.set_arg(i, syclex::raw_kernel_arg(args, size));
        }
        args += size;
      }
      h.parallel_for(sycl::nd_range<3>({range[0], range[1], range[2]}, {range[3], range[4], range[5]}),
                     *static_cast<sycl::kernel*>(kernel));
    });
    if (wait) done.wait_and_throw();
    return 1;
  });
}
}
