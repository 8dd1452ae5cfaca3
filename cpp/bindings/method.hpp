// What plain C methods share: step and run of a stream, step of a pool. They are not bound by pybind11, whose
// conversion of the arguments would take longer than the work itself.
#pragma once

#include <array>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "../core/forks.hpp"
#include "pybind.hpp"

namespace gatewise {

// The C++ object in a Python object whose type the method descriptor has checked; null before __init__, and for a class
// that inherits from two of ours.
template <class Object>
Object* object_in(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  return instance->simple_layout ? static_cast<Object*>(instance->simple_value_holder[0]) : nullptr;
}

// Who uses an object. A fork in the middle of a call leaves the object in use by a thread that the child does not have.
struct Occupancy {
  std::atomic<std::uint32_t> user{0};  // 0: nobody; else a thread of the process after this many forks, plus one

  bool is_abandoned() const {
    const std::uint32_t present = user.load(std::memory_order_acquire);
    return present != 0 && present != forks() + 1;
  }
};

// Exclusive use of an object while this lives. A second user is refused instead of having to wait.
class ExclusiveUse {
 public:
  // takes_abandoned: also takes an object that a fork left in use; it must then be renewed.
  ExclusiveUse(Occupancy& occupancy, const char* in_use, const char* abandoned, bool takes_abandoned = false)
      : user_(occupancy.user), in_use_(in_use), abandoned_(abandoned) {
    const std::uint32_t this_process = forks() + 1;
    std::uint32_t present = 0;
    is_ours_ = user_.compare_exchange_strong(present, this_process, std::memory_order_acquire);
    was_abandoned_ = !is_ours_ && present != this_process;
    former_user_ = present;
    if (was_abandoned_ && takes_abandoned)
      is_ours_ = user_.compare_exchange_strong(present, this_process, std::memory_order_acquire);
  }
  ~ExclusiveUse() {
    if (is_ours_) user_.store(0, std::memory_order_release);
  }
  ExclusiveUse(const ExclusiveUse&) = delete;
  ExclusiveUse& operator=(const ExclusiveUse&) = delete;

  explicit operator bool() const { return is_ours_; }
  bool was_abandoned() const { return was_abandoned_; }
  // Leaves an abandoned object that could not be renewed as it was.
  void abandon() {
    user_.store(former_user_, std::memory_order_release);
    is_ours_ = false;
  }
  const char* refusal() const { return was_abandoned_ ? abandoned_ : in_use_; }
  void require() const {
    if (!is_ours_) throw std::runtime_error(refusal());
  }

 private:
  std::atomic<std::uint32_t>& user_;
  const char* const in_use_;
  const char* const abandoned_;
  bool is_ours_, was_abandoned_;
  std::uint32_t former_user_;
};

// Calls work() and makes a Python exception of what it throws. Returns false if there is one.
template <class Work>
bool without_exceptions(const Work& work) {
  try {
    work();
    return true;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return false;
}

// Whether no object is an instance of a subclass of ndarray, whose numbers may mean something else, as those of a
// masked array do.
template <class... Objects>
bool are_plain(Objects*... objects) {
  return ((!objects || !PyArray_Check(objects) || PyArray_CheckExact(objects)) && ...);
}

// The arguments of a C method, in the order of its parameters; null: not passed, or None where that is the default.
constexpr int max_parameters = 3;
using Arguments = std::array<PyObject*, max_parameters>;

struct Method {
  const char* object;   // "stream"
  const char* usage;    // what the error for other arguments says
  const char* prepare;  // of Python: converts arguments that do not fit, or says what is wrong
  std::array<const char*, max_parameters> names;  // of the parameters
  int positional;                                 // at most this many come without their names
  int required;                                   // this many, the first ones, must be passed
};

// Reads the arguments of a METH_FASTCALL | METH_KEYWORDS call. Returns false if they do not fit the parameters.
inline bool read_arguments(const Method& method, PyObject* const* values, Py_ssize_t count, PyObject* names,
                           Arguments& arguments) {
  if (count > method.positional) return false;
  for (Py_ssize_t i = 0; i < count; ++i) arguments[static_cast<std::size_t>(i)] = values[i];
  for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
    PyObject** argument = nullptr;
    for (std::size_t n = 0; n < max_parameters; ++n)
      if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), method.names[n]) == 0) argument = &arguments[n];
    if (!argument || *argument) return false;
    *argument = values[count + i];
  }
  for (std::size_t n = 0; n < max_parameters; ++n) {
    if (static_cast<int>(n) < method.required && !arguments[n]) return false;
    if (static_cast<int>(n) >= method.required && arguments[n] == Py_None) arguments[n] = nullptr;
  }
  return true;
}

// Calls work(object, arguments) for a C method: with the arguments as they came if fits(object, arguments, true), else
// with what Python's `prepare` makes of them, if fits(object, arguments, false).
template <class Object, class Fits, class Work>
PyObject* call_method(const Method& method, PyObject* self, PyObject* const* values, Py_ssize_t count, PyObject* names,
                      const Fits& fits, const Work& work) {
  Object* const object = object_in<Object>(self);
  if (!object) {
    PyErr_Format(PyExc_TypeError, "%s: not initialised", method.object);
    return nullptr;
  }
  Arguments arguments{};
  if (!read_arguments(method, values, count, names, arguments)) {
    PyErr_SetString(PyExc_TypeError, method.usage);
    return nullptr;
  }
  if (are_plain(arguments[0], arguments[1], arguments[2]) && fits(*object, arguments, true))
    return work(*object, arguments);
  const auto none_if_null = [&](std::size_t n) { return arguments[n] ? arguments[n] : Py_None; };
  const auto prepared = py::reinterpret_steal<py::object>(
      PyObject_CallMethod(self, method.prepare, "OOO", none_if_null(0), none_if_null(1), none_if_null(2)));
  if (!prepared) return nullptr;
  if (PyTuple_Check(prepared.ptr()) && PyTuple_GET_SIZE(prepared.ptr()) == max_parameters) {
    for (std::size_t n = 0; n < max_parameters; ++n) {
      PyObject* const item = PyTuple_GET_ITEM(prepared.ptr(), static_cast<Py_ssize_t>(n));
      arguments[n] = item == Py_None ? nullptr : item;
    }
    if (arguments[0] && fits(*object, arguments, false)) return work(*object, arguments);
  }
  PyErr_SetString(PyExc_ValueError, "internal: prepared arrays do not fit");
  return nullptr;
}

// Sets the exception for a token that a table of this many rows does not have.
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
