#include "arrays.hpp"

namespace gatewise {

const Kernels& kernels_for(const py::dtype& dtype) {
  require(dtype.num() == NPY_FLOAT || dtype.num() == NPY_DOUBLE, "dtype: expected float32 or float64");
  const Backend& backend = active_backend();
  return dtype.num() == NPY_FLOAT ? *backend.float32 : *backend.float64;
}

void* flat(int type_number, const Array& array, Size size, bool writeable) {
  if (!array) return nullptr;
  auto* raw = reinterpret_cast<PyArrayObject*>(array->ptr());
  require(PyArray_TYPE(raw) == type_number && PyArray_ISCARRAY_RO(raw) && PyArray_SIZE(raw) == size &&
              (!writeable || PyArray_ISWRITEABLE(raw)),
          "internal: an array of the wrong dtype, size or layout");
  return PyArray_DATA(raw);
}

Rows<void*> rows_of(const Kernels& kernels, const py::array& array, Size steps, Size batch, Size units,
                    bool writeable) {
  auto* raw = reinterpret_cast<PyArrayObject*>(array.ptr());
  const Size item = kernels.item_bytes;
  require(PyArray_TYPE(raw) == type_number_of(kernels) && PyArray_ISNOTSWAPPED(raw) && PyArray_ISALIGNED(raw) &&
              PyArray_NDIM(raw) == 3 && PyArray_DIM(raw, 0) == steps && PyArray_DIM(raw, 1) == batch &&
              PyArray_DIM(raw, 2) == units &&
              (PyArray_STRIDE(raw, 2) == item || units <= 1 || PyArray_SIZE(raw) == 0) &&
              PyArray_STRIDE(raw, 0) % item == 0 && PyArray_STRIDE(raw, 1) % item == 0 &&
              (!writeable || PyArray_ISWRITEABLE(raw)),
          "internal: rows of the wrong dtype, shape or layout");
  return {PyArray_DATA(raw), PyArray_STRIDE(raw, 0) / item, PyArray_STRIDE(raw, 1) / item};
}

}  // namespace gatewise
