// Memory for the core, aligned to cache lines. Large blocks are recycled: a fresh block of 80 MB costs 29 ms of page
// faults, more than some of the calls that ask for one.
#pragma once

#include <cstddef>

namespace gatewise {

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Gives the blocks that are kept for later calls back to the system. Returns how many bytes they had.
std::size_t release_memory();

}  // namespace gatewise
