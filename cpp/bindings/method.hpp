// What the plain C methods share, which pybind11's conversions would cost more than the work they call: step of a
// stream and of a pool.
#pragma once

#include <atomic>
#include <stdexcept>
#include <utility>

#include "python.hpp"

namespace gatewise {

// The object in a Python object, whose type the method descriptor has checked; null before __init__.
template <class Object>
Object* object_in(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  return static_cast<Object*>(instance->simple_layout ? instance->simple_value_holder[0]
                                                      : instance->nonsimple.values_and_holders[0]);
}

// One user at a time: a second is told so instead of waiting.
class Turn {
 public:
  Turn(std::atomic<bool>& busy, const char* refused)
      : busy_(busy), refused_(refused), taken_(!busy.exchange(true, std::memory_order_acquire)) {}
  ~Turn() {
    if (taken_) busy_.store(false, std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  explicit operator bool() const { return taken_; }
  const char* refused() const { return refused_; }
  void require() const {
    if (!taken_) throw std::runtime_error(refused_);
  }

 private:
  std::atomic<bool>& busy_;
  const char* const refused_;
  const bool taken_;
};

// The exception for a token that a table of so many rows does not have.
inline void refuse_token(Size rows, std::int64_t token) {
  PyErr_Format(PyExc_ValueError, "x: expected numbers from 0 to %zd, got %lld", rows - 1,
               static_cast<long long>(token));
}

inline bool overlap(PyObject* a, PyObject* b) {
  const auto range = [](PyObject* object) {
    auto* array = reinterpret_cast<PyArrayObject*>(object);
    const char* begin = PyArray_BYTES(array);
    return std::pair(begin, begin + PyArray_NBYTES(array));
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  return a_begin < b_end && b_begin < a_end;
}

}  // namespace gatewise
