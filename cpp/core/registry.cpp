#include "registry.hpp"

#include <atomic>

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
  std::vector<Backend> runnable;
#define GATEWISE_LEVEL(LEVEL)                    \
  if (runs_here(LEVEL##_float32::kernels.level)) \
    runnable.push_back({LEVEL##_float32::kernels.level, &LEVEL##_float32::kernels, &LEVEL##_float64::kernels});
  GATEWISE_LEVELS
#undef GATEWISE_LEVEL
  return runnable;
}

std::atomic<const Backend*> active{nullptr};

}  // namespace

const std::vector<Backend>& backends() {
  static const std::vector<Backend> runnable = find_backends();
  return runnable;
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

}  // namespace gatewise
