// Backends, threads, recycled memory, and what only tests and benchmarks ask for.
#include <cstring>

#include "../core/memory.hpp"
#include "../core/threads.hpp"
#include "arrays.hpp"
#include "interruption.hpp"
#include "names.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace gatewise {
namespace {

py::dict configuration() {
  py::list levels;
#define GATEWISE_LEVEL(LEVEL) levels.append(#LEVEL);
  GATEWISE_LEVELS
#undef GATEWISE_LEVEL
  using namespace py::literals;
  return py::dict("version"_a = GATEWISE_VERSION, "compiler"_a = GATEWISE_COMPILER, "openmp"_a = has_threads(),
                  "eigen"_a = GATEWISE_EIGEN, "levels"_a = levels);
}

// An uninitialised array whose memory goes back to the store of recycled blocks, not to the system.
py::array empty(const std::vector<py::ssize_t>& shape, const py::dtype& dtype) {
  require(dtype.num() == NPY_FLOAT || dtype.num() == NPY_DOUBLE, "dtype: expected float32 or float64");
  py::ssize_t bytes = dtype.itemsize();
  for (const py::ssize_t size : shape)
    if (size < 0 || __builtin_mul_overflow(bytes, size, &bytes)) throw std::bad_alloc();
  auto buffer = std::make_unique<Buffer>(static_cast<std::size_t>(bytes));
  void* data = buffer->data();
  const py::capsule owner(buffer.release(), [](void* pointer) { delete static_cast<Buffer*>(pointer); });
  return py::array(dtype, shape, data, owner);
}

// Takes a new reference; throws the present Python exception if it is null.
py::array taken_array(PyObject* array) {
  if (!array) throw py::error_already_set();
  return py::reinterpret_steal<py::array>(array);
}

py::array evaluate(const std::string& name, const py::array& x, double alpha, double beta) {
  const Function function = function_of({name, alpha, beta});
  if (function.activation == Activation::softmax)
    throw py::value_error("name: softmax is a function of rows, expected one of elements");
  const bool is_double = x.dtype().num() == NPY_DOUBLE;
  if (!is_double && x.dtype().num() != NPY_FLOAT) throw py::type_error("x: expected float32 or float64");
  const auto contiguous =
      taken_array(PyArray_FROMANY(x.ptr(), x.dtype().num(), 0, 0, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED));
  py::array y(contiguous.dtype(), std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  const Backend& backend = active_backend();
  (is_double ? backend.float64 : backend.float32)->evaluate(function, x.size(), contiguous.data(), y.mutable_data());
  return y;
}

// Without the GIL, so that a benchmark can load all cores at once.
Size multiply_add(const py::dtype& dtype, Size repetitions) {
  const Kernels& kernels = kernels_for(dtype);
  Size operations = 0;
  without_gil(gil_operations, [&] { operations = kernels.multiply_add(repetitions); });
  return operations;
}

Size read(const py::dtype& dtype, Size bytes, Size repetitions) {
  const Kernels& kernels = kernels_for(dtype);
  if (bytes < 0 || repetitions < 0) throw py::value_error("bytes, repetitions: expected numbers that are not negative");
  const Buffer zeros(static_cast<std::size_t>(bytes));
  std::memset(zeros.data(), 0, static_cast<std::size_t>(bytes));
  Size bytes_read = 0;
  without_gil(gil_operations,
              [&] { bytes_read = kernels.read(zeros.data(), bytes / kernels.item_bytes, repetitions); });
  return bytes_read;
}

}  // namespace

void bind_settings(py::module_& module) {
  module.def("configuration", configuration);
  module.def("backends", [] {
    py::list names;
    for (const Backend& backend : backends()) names.append(backend.name);
    return py::tuple(names);
  });
  module.def("backend", [] { return active_backend().name; });
  module.def("use_backend", use_backend, py::arg("name"));
  module.def("lanes", [] { return std::pair(active_backend().float32->lanes, active_backend().float64->lanes); });
  module.def("set_num_threads", set_threads, py::arg("threads"));
  module.def("get_num_threads", threads);
  module.def("set_threading_threshold", set_threading_threshold, py::arg("operations"));
  module.def("release_memory", [] {
    std::size_t released = 0;
    without_gil(gil_operations, [&] { released = release_memory(); });
    return released;
  });
  module.def("empty", empty, py::arg("shape"), py::arg("dtype"));
  module.def("evaluate", evaluate, py::arg("name"), py::arg("x"), py::arg("alpha") = 0.0, py::arg("beta") = 0.0);
  module.def("multiply_add", multiply_add, py::arg("dtype"), py::arg("repetitions"));
  module.def("read", read, py::arg("dtype"), py::arg("bytes"), py::arg("repetitions"));
#if defined(__x86_64__)
  module.def("floating_point_mode", [] { return _mm_getcsr(); });
  // Bits that no processor has are cleared, since setting them raises a signal; exceptions stay masked.
  module.def("set_floating_point_mode", [](unsigned mode) { _mm_setcsr((mode & 0xffffu) | 0x1f80u); }, py::arg("mode"));
#else
  module.def("floating_point_mode", [] { return 0u; });
  module.def("set_floating_point_mode", [](unsigned) {}, py::arg("mode"));
#endif
}

}  // namespace gatewise
