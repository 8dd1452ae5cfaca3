// Which backends were built, which this machine can run, which one is in use; and how many threads a call may have.
// The only global state of the library, and the only code that asks the CPU what it is.
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

// Those that this machine can run, best last.
const std::vector<Backend>& backends();

const Backend& active_backend();
bool use_backend(const std::string& name);  // false: no such backend here

void set_threads(int threads);
int threads();

// The least multiply-adds a step for which a call is cut over threads.
Size set_threading_threshold(Size operations);

// How many threads a call deserves that does `operations` multiply-adds a step in `steps` steps and can be cut into
// `parts`.
int threads_for(Size operations, Size steps, Size parts);

// Whether this build can use more than one thread.
bool has_threads();

}  // namespace gatewise
