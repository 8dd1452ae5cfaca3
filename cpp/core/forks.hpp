// Counts the forks between the process that loaded this library and the present one.
#pragma once

#include <atomic>
#include <cstdint>

namespace gatewise {

extern std::atomic<std::uint32_t> fork_count;  // counted in threads.cpp

inline std::uint32_t forks() { return fork_count.load(std::memory_order_relaxed); }

}  // namespace gatewise
