// The one place that includes Python, NumPy and pybind11.
#pragma once

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL GATEWISE_ARRAY_API
#ifndef GATEWISE_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numpy/arrayobject.h>

#include <memory>

namespace gatewise {

namespace py = pybind11;

inline void require(bool holds, const char* message) {
  if (!holds) throw py::value_error(message);
}

// Refuses null, which is what pybind11 makes of None.
template <class Object>
const std::shared_ptr<Object>& present(const std::shared_ptr<Object>& object) {
  if (!object) throw py::type_error("internal: expected an object of the core, got None");
  return object;
}

}  // namespace gatewise
