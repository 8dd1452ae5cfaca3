// Which backends were built, which ones this machine can run, and which one is active: with the number of threads the
// only global state of the library, and the only code that asks the CPU what it is.
#pragma once

#include <string>
#include <vector>

#include "contract.hpp"

namespace gatewise {

struct Backend {
  const char* name;
  const Kernels* float32;
  const Kernels* float64;
};

// The backends that this machine can run, the best one last.
const std::vector<Backend>& backends();

const Backend& active_backend();
bool use_backend(const std::string& name);  // false: no such backend here

}  // namespace gatewise
