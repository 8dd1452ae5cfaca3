#include "threads.hpp"

#include <algorithm>
#include <mutex>
#include <thread>
#include <vector>

#include "forks.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace gatewise {

std::atomic<std::uint32_t> fork_count{0};

namespace {

std::atomic<int> thread_count{1};

// A step of 16,384 multiply-adds takes 0.3 to 0.5 us on one core, a barrier of two threads 0.06 us. But opening the
// parallel region takes 0.4 us and, if its threads have gone to sleep, up to 50 us: hence at least `min_steps` such
// steps in all.
std::atomic<Size> threshold{16384};
constexpr Size min_steps = 32;

// GCC's OpenMP does not survive a fork: a child that opened a region would wait for threads that it does not have. So
// children use one thread.
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watch_for_fork = pthread_atfork(nullptr, nullptr, [] { ++fork_count; });
#endif

// The size of the last team that this thread started. OpenMP keeps those threads for its next team.
thread_local int last_team = 1;

// Whether the system starts this many more threads that live at the same time.
bool can_start(int count) noexcept {
  std::mutex gate;
  std::vector<std::thread> started;
  bool all = true;
  {
    const std::lock_guard closed(gate);
    try {
      for (int i = 0; i < count; ++i) started.emplace_back([&gate] { const std::lock_guard passed(gate); });
    } catch (...) {
      all = false;
    }
  }
  for (std::thread& thread : started) thread.join();
  return all;
}

}  // namespace

bool has_threads() {
#ifdef GATEWISE_OPENMP
  return true;
#else
  return false;
#endif
}

void set_threads(int threads) { thread_count = threads; }
int threads() { return has_threads() && forks() == 0 ? thread_count.load() : 1; }

Size set_threading_threshold(Size operations) { return threshold.exchange(operations); }

int threads_for(Size operations, Size steps, Size parts) {
  const Size least = threshold.load(std::memory_order_relaxed);
  if (operations < least || operations * steps < least * min_steps) return 1;
  return static_cast<int>(std::max<Size>(1, std::min<Size>(threads(), parts)));
}

// GCC's OpenMP ends the process if it cannot start a thread, and there is no way to ask it first. So whenever a team
// needs more threads than OpenMP keeps for this thread, those of its last team, as many are started here first, to see
// whether it works. (Two more threads: 40 us, once.)
int startable_threads(int threads) {
  if (threads <= last_team || can_start(threads - last_team)) last_team = threads;
  return last_team;
}

void set_last_team(int threads) { last_team = threads; }

}  // namespace gatewise
