// The table of contents of gatewise._core. What is said to the user is said in Python; here are only the checks that
// keep memory safe.
#define GATEWISE_IMPORTS_NUMPY
#include "python.hpp"

PYBIND11_MODULE(_core, module, pybind11::mod_gil_not_used()) {
  if (_import_array() < 0) throw pybind11::error_already_set();
  gatewise::bind_settings(module);
  gatewise::bind_plans(module);
  gatewise::bind_layers(module);
  gatewise::bind_networks(module);
  gatewise::bind_streams(module);
  gatewise::bind_pools(module);
  gatewise::bind_foreign(module);
  gatewise::bind_tensors(module);
  gatewise::bind_xla(module);
}
