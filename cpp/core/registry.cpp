#include "registry.hpp"

#include <algorithm>
#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace gatewise {

// CMake names the levels that it builds: GATEWISE_LEVELS is GATEWISE_LEVEL(generic) GATEWISE_LEVEL(v3) ...
#define GATEWISE_LEVEL(LEVEL)     \
  namespace LEVEL##_float32 {     \
    extern const Kernels kernels; \
  }                               \
  namespace LEVEL##_float64 {     \
    extern const Kernels kernels; \
  }
GATEWISE_LEVELS
#undef GATEWISE_LEVEL

namespace {

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");  // f16c, lzcnt and movbe came with them everywhere
  if (name == "x86-64-v3") return v3;
  if (name == "x86-64-v4")
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#endif
  return name == "generic" || name == "native";
}

std::vector<Backend> find_backends() {
  std::vector<Backend> found;
#define GATEWISE_LEVEL(LEVEL)                    \
  if (runs_here(LEVEL##_float32::kernels.level)) \
    found.push_back({LEVEL##_float32::kernels.level, &LEVEL##_float32::kernels, &LEVEL##_float64::kernels});
  GATEWISE_LEVELS
#undef GATEWISE_LEVEL
  return found;
}

std::atomic<const Backend*> active{nullptr};
std::atomic<int> thread_count{1};

// One step of 16,384 multiply-adds takes 0.3 to 0.5 us on one core, a meeting of two threads 0.06 us; but opening
// the region takes 0.4 us and, when its threads have gone to sleep, up to 50: hence `least_steps` such steps in all.
std::atomic<Size> threshold{16384};
constexpr Size least_steps = 32;

// The OpenMP of GCC does not survive a fork: a child that opened a region would wait for threads that it does not
// have. It runs on one thread instead.
std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watch_for_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

const std::vector<Backend>& backends() {
  static const std::vector<Backend> found = find_backends();
  return found;
}

const Backend& active_backend() {
  const Backend* chosen = active.load(std::memory_order_relaxed);
  return chosen ? *chosen : backends().back();
}

bool use_backend(const std::string& name) {
  for (const Backend& backend : backends())
    if (name == backend.name) {
      active = &backend;
      return true;
    }
  return false;
}

void set_threads(int threads) { thread_count = threads; }
int threads() { return has_threads() && !forked ? thread_count.load() : 1; }

Size set_threading_threshold(Size operations) { return threshold.exchange(operations); }

int threads_for(Size operations, Size steps, Size parts) {
  const Size least = threshold.load(std::memory_order_relaxed);
  if (operations < least || operations * steps < least * least_steps) return 1;
  return static_cast<int>(std::max<Size>(1, std::min<Size>(threads(), parts)));
}

bool has_threads() {
#ifdef GATEWISE_OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace gatewise
