// Teams of threads: the only place that knows OpenMP. One parallel region a call, a spinning barrier within it.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "register.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Denormals flushed, nearest rounding, exceptions masked while the core runs on this thread; then the caller's mode
// again. A fixed mode, so that the caller's cannot change a bit of the results.
class FloatingPointMode {
 public:
#if defined(__x86_64__)
  FloatingPointMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80 | 0x8040); }
  ~FloatingPointMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FloatingPointMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(std::uint64_t(1) << 24));
  }
  ~FloatingPointMode() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  std::uint64_t before_;
#else
  FloatingPointMode() {}
#endif
 public:
  FloatingPointMode(const FloatingPointMode&) = delete;
  FloatingPointMode& operator=(const FloatingPointMode&) = delete;
};

// Spins for about 10 us, then lets others run: a peer that lost its processor must not cost us ours as well.
constexpr int spins_before_yield = 1000;

// A barrier is a count of arrivals that only grows. Each has a cache line to itself.
struct alignas(64) Arrivals {
  std::uint64_t count = 0;
};
constexpr int most_groups = 32;

// One thread's place in a team.
struct Team {
  int size = 1, rank = 0;
  Arrivals* arrivals = nullptr;  // of the team, then of each group that it may be cut into

  // The group of this thread if the team is cut into `groups` equal ones, and which of them it is.
  Team group(int groups) const {
    if (groups == 1) return *this;
    const int threads = size / groups;
    return {threads, rank % threads, arrivals + 1 + rank / threads};
  }
  int group_rank(int groups) const { return rank / (size / groups); }

  // This thread's share [begin, end) of `count` things: the same share each time, so that a thread meets its own
  // data again in its own cache.
  struct Share {
    Size begin, end;
    Size count() const { return end - begin; }
  };
  Share share(Size count) const { return size == 1 ? Share{0, count} : part(count, rank, size); }
  static Share part(Size count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

  void wait() const {
    if (size == 1) return;
#ifdef _OPENMP
    const auto team = static_cast<std::uint64_t>(size);
    const std::uint64_t arrived = __atomic_fetch_add(&arrivals->count, 1, __ATOMIC_ACQ_REL);
    const std::uint64_t all = arrived - arrived % team + team;
    for (int spins = 0; __atomic_load_n(&arrivals->count, __ATOMIC_ACQUIRE) < all; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spins >= spins_before_yield) sched_yield();
    }
#endif
  }
};

// Calls work(team) on each thread of a team of at most `threads`. One thread never touches OpenMP.
template <class Work>
void run_team(int threads, const Work& work) {
  const FloatingPointMode mode;
#ifdef _OPENMP
  if (threads > 1) {
    Arrivals arrivals[1 + most_groups];
#pragma omp parallel num_threads(threads)
    {
      const FloatingPointMode worker_mode;
      work(Team{omp_get_num_threads(), omp_get_thread_num(), arrivals});
    }
    return;
  }
#endif
  (void)threads;
  work(Team{});
}

}  // namespace gatewise::GATEWISE_KERNEL
