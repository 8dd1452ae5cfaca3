// Teams of threads: the only place that knows OpenMP. One parallel region for each call, with a spinning barrier in it.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#include "../core/threads.hpp"
#include "register.hpp"

namespace gatewise::GATEWISE_KERNEL {

// While the core runs on this thread: denormals flushed, rounding to nearest, exceptions masked. Then the caller's mode
// is restored. The mode is fixed so that the caller's cannot change a bit of the results.
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

// Spins for about 10 us, then yields: the thread that all wait for may need this processor.
constexpr int spins_before_yield = 1000;

// A barrier is a count of arrivals that only grows. Each barrier has its own cache line.
struct alignas(64) Arrivals {
  std::uint64_t count = 0;
  std::uint64_t last = UINT64_MAX;  // the count of arrivals after which an interrupted call ends
};
constexpr int max_groups = 32;

// A team of threads, as one of them sees it.
struct Team {
  int size = 1, rank = 0;
  Arrivals* arrivals = nullptr;  // of the team, then of each group that it may be split into
  bool is_caller = true;         // the thread that made the call

  // The group of this thread if the team is split into `groups` equal groups, and the number of that group.
  Team group(int groups) const {
    if (groups == 1) return *this;
    const int threads = size / groups;
    return {threads, rank % threads, arrivals + 1 + rank / threads, is_caller};
  }
  int group_rank(int groups) const { return rank / (size / groups); }

  // This thread's share [begin, end) of `count` items. It is always the same, so that its data is still in the cache of
  // the thread's processor.
  struct Share {
    Size begin, end;
    Size count() const { return end - begin; }
  };
  Share share(Size count) const { return size == 1 ? Share{0, count} : part(count, rank, size); }
  static Share part(Size count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

  void wait() const {
    if (size == 1) return;
#ifdef _OPENMP
    const std::uint64_t complete = next_barrier(__atomic_fetch_add(&arrivals->count, 1, __ATOMIC_ACQ_REL));
    for (int spins = 0; __atomic_load_n(&arrivals->count, __ATOMIC_ACQUIRE) < complete; ++spins) {
#if defined(__x86_64__)
      _mm_pause();
#endif
      if (spins >= spins_before_yield) sched_yield();
    }
#endif
  }

  // Waits as well, and then returns the same to all threads: false if the call must end. Only one thread decides,
  // before it arrives, and says at which barrier: a thread that has not yet left the barrier before must not learn of
  // it there, or it would end while the others wait for it.
  bool goes_on(Interrupt* interrupt) const {
    const bool ends = is_asked_to_end(interrupt);
    if (size == 1) return !ends;
#ifdef _OPENMP
    const std::uint64_t barrier = next_barrier(__atomic_load_n(&arrivals->count, __ATOMIC_ACQUIRE));
    if (rank == 0 && ends) __atomic_store_n(&arrivals->last, barrier, __ATOMIC_RELEASE);
    wait();
    return __atomic_load_n(&arrivals->last, __ATOMIC_ACQUIRE) > barrier;
#else
    return true;
#endif
  }

  // Whether this thread knows that the call must end; others may not know yet. It may then leave out work whose results
  // nobody will read, but no barrier.
  bool is_asked_to_end(Interrupt* interrupt) const {
    if (!is_caller || !interrupt) return is_asked(interrupt);
    interrupt->others_wait = arrivals;
    return look_whether_asked(interrupt);
  }

 private:
  // The count that completes the present barrier, of which `arrived` threads have come, without this thread.
  std::uint64_t next_barrier(std::uint64_t arrived) const {
    const auto team = static_cast<std::uint64_t>(size);
    return arrived - arrived % team + team;
  }
};

// ThreadSanitizer does not see how OpenMP begins and ends a region. These tell it that what a thread did before a
// release has happened before what another thread does after an acquire.
inline void tell_release([[maybe_unused]] Arrivals* arrivals) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(arrivals);
#endif
}
inline void tell_acquire([[maybe_unused]] Arrivals* arrivals) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(arrivals);
#endif
}

// Calls work(team) on each thread of a team of at most `threads`. One thread does not use OpenMP.
template <class Work>
void run_team(int threads, const Work& work) {
  const FloatingPointMode mode;
#ifdef _OPENMP
  // Inside another region, of a signal's handler or of another library, OpenMP gives one thread.
  if (threads > 1 && omp_in_parallel()) threads = 1;
  if (threads > 1) threads = startable_threads(threads);
  if (threads > 1) {
    Arrivals arrivals[1 + max_groups];
    tell_release(arrivals);
#pragma omp parallel num_threads(threads)
    {
      tell_acquire(arrivals);
      const FloatingPointMode worker_mode;
      if (omp_get_thread_num() == 0) set_last_team(omp_get_num_threads());
      work(Team{omp_get_num_threads(), omp_get_thread_num(), arrivals, omp_get_thread_num() == 0});
      tell_release(arrivals);
    }
    tell_acquire(arrivals);
    return;
  }
#endif
  (void)threads;
  work(Team{});
}

}  // namespace gatewise::GATEWISE_KERNEL
