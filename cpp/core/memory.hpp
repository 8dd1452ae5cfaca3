// Memory for the core: aligned to cache lines, and large blocks used again. A fresh block of 80 MB costs 29 ms of
// page faults, more than some of the calls that ask for one.
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

// Returns the blocks that are held for later calls to the system; how many bytes they were.
std::size_t release_memory();

}  // namespace gatewise
