// Buffers that a thread keeps between calls: aligned, growing, on 2 MB pages where they are large.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <new>

namespace llmrt {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  void* get(int64_t bytes) {
    if (bytes > size_) {
      free(data_);
      const int64_t page = bytes >= (2 << 20) ? 2 << 20 : 4096;
      size_ = (bytes + page - 1) / page * page;
      data_ = aligned_alloc(page, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
      if (page > 4096) madvise(data_, size_, MADV_HUGEPAGE);
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace llmrt
