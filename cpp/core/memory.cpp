#include "memory.hpp"

#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gatewise {
namespace {

constexpr std::size_t alignment = 64;
constexpr std::size_t min_recycled = std::size_t(1) << 20;  // the C library recycles smaller blocks itself
constexpr std::size_t max_stored = std::size_t(256) << 20;  // bytes of all stored blocks
constexpr int places = 16;

struct Block {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// Freed blocks for later calls. Never blocks: if the lock is held, by another thread or by one that did not survive a
// fork, memory comes from the system instead. Never destroyed, since arrays may outlive the module.
struct Store {
  std::mutex mutex;
  Block blocks[places];
  std::size_t bytes = 0;
  int next = 0;  // the place whose block is dropped next

  // An empty place; if there is none, the next block is dropped.
  Block& free_place() {
    for (Block& place : blocks)
      if (!place.data) return place;
    return drop_next();
  }

  Block& drop_next() {
    Block& place = blocks[next];
    next = (next + 1) % places;
    bytes -= place.bytes;
    std::free(std::exchange(place, Block{}).data);
    return place;
  }
};
Store& store() {
  static Store* const instance = new Store;
  return *instance;
}

// Sizes are rounded up to one of eight steps between powers of two, so that the block of a slightly different call fits
// as well. With AddressSanitizer they are not rounded: it must know where each block ends.
std::size_t rounded(std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return bytes;
#endif
  std::size_t step = alignment;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// Unlike std::aligned_alloc, posix_memalign takes sizes of any alignment. Null if there is no memory.
void* allocate(std::size_t bytes) {
  void* data = nullptr;
  return posix_memalign(&data, alignment, bytes) == 0 ? data : nullptr;
}

// Tell AddressSanitizer whether a block may be touched: not while it is stored.
void forbid([[maybe_unused]] const Block& block) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block.data, block.bytes);
#endif
}
void allow([[maybe_unused]] const Block& block) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(block.data, block.bytes);
#endif
}

Block take(std::size_t bytes) {
  const std::unique_lock lock(store().mutex, std::try_to_lock);
  if (lock.owns_lock())
    for (Block& block : store().blocks)
      if (block.bytes == bytes) {
        store().bytes -= bytes;
        allow(block);
        return std::exchange(block, Block{});
      }
  return {};
}

// Blocks are dropped in turn, so that the store adapts when sizes change.
void give_back(Block block) {
  const std::unique_lock lock(store().mutex, std::try_to_lock);
  if (!lock.owns_lock() || block.bytes > max_stored) return std::free(block.data);
  while (store().bytes + block.bytes > max_stored) store().drop_next();
  forbid(block);
  store().free_place() = block;
  store().bytes += block.bytes;
}

}  // namespace

std::size_t release_memory() {
  constexpr int max_attempts = 1000;  // a store that a fork left locked stays so
  std::unique_lock lock(store().mutex, std::defer_lock);
  for (int attempt = 0; !lock.try_lock(); ++attempt) {
    if (attempt == max_attempts) return 0;
    std::this_thread::yield();
  }
  const std::size_t released = store().bytes;
  for (int place = 0; place < places; ++place) store().drop_next();
  lock.unlock();
#if defined(__GLIBC__)
  malloc_trim(0);  // blocks of up to 32 MB come from the heap once the C library has seen one of that size freed
#endif
  return released;
}

Buffer::Buffer(std::size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  bytes_ = rounded(bytes + 1);  // never empty, so that data is never null
  if (bytes_ >= min_recycled) data_ = take(bytes_).data;
  if (!data_) data_ = allocate(bytes_);
  if (!data_ && release_memory() > 0) data_ = allocate(bytes_);
  if (!data_) throw std::bad_alloc();
}

Buffer::~Buffer() {
  if (bytes_ >= min_recycled)
    give_back({data_, bytes_});
  else
    std::free(data_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace gatewise
