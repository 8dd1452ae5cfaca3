// NumPy's arrays as the core reads and writes them. Python has made them fit; here is only what keeps memory safe.
#pragma once

#include <optional>

#include "../core/registry.hpp"
#include "pybind.hpp"

namespace gatewise {

using Array = std::optional<py::array>;

// The table of the active backend for float32 or float64.
const Kernels& kernels_for(const py::dtype& dtype);

inline int type_number_of(const Kernels& kernels) { return kernels.item_bytes == 4 ? NPY_FLOAT : NPY_DOUBLE; }

// The elements of a C-contiguous array of this type and size; null for None.
void* flat(int type_number, const Array& array, Size size, bool writeable);
inline void* flat(const Kernels& kernels, const Array& array, Size size, bool writeable) {
  return flat(type_number_of(kernels), array, size, writeable);
}

// An array [T, B, units] whose units are contiguous and whose other strides are any.
Rows<void*> rows_of(const Kernels& kernels, const py::array& array, Size steps, Size batch, Size units, bool writeable);

}  // namespace gatewise
