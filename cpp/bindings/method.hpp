// What the plain C methods share, which pybind11's conversions would cost more than the work they call: step and run of
// a stream, step of a pool.
#pragma once

#include <array>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "../core/forks.hpp"
#include "pybind.hpp"

namespace gatewise {

// The object in a Python object, whose type the method descriptor has checked; null before __init__, and where a class
// inherits from two of ours.
template <class Object>
Object* object_in(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  return instance->simple_layout ? static_cast<Object*>(instance->simple_value_holder[0]) : nullptr;
}

// Who uses an object. A fork may leave it behind in the middle of a call, whose thread the child does not have.
struct Turns {
  std::atomic<std::uint32_t> user{0};  // 0: nobody; else a thread of the process after so many forks, plus one

  bool were_left() const {
    const std::uint32_t present = user.load(std::memory_order_acquire);
    return present != 0 && present != forks() + 1;
  }
};

// One user at a time: a second is told so instead of waiting.
class Turn {
 public:
  // takes_left: also takes what a fork left behind, which must then be made anew.
  Turn(Turns& turns, const char* in_use, const char* left_behind, bool takes_left = false)
      : user_(turns.user), in_use_(in_use), left_behind_(left_behind) {
    const std::uint32_t own = forks() + 1;
    std::uint32_t present = 0;
    taken_ = user_.compare_exchange_strong(present, own, std::memory_order_acquire);
    was_left_ = !taken_ && present != own;
    left_by_ = present;
    if (was_left_ && takes_left) taken_ = user_.compare_exchange_strong(present, own, std::memory_order_acquire);
  }
  ~Turn() {
    if (taken_) user_.store(0, std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  explicit operator bool() const { return taken_; }
  bool was_left() const { return was_left_; }
  // For what was left and could not be made anew: it stays as it was.
  void leave() {
    user_.store(left_by_, std::memory_order_release);
    taken_ = false;
  }
  const char* refused() const { return was_left_ ? left_behind_ : in_use_; }
  void require() const {
    if (!taken_) throw std::runtime_error(refused());
  }

 private:
  std::atomic<std::uint32_t>& user_;
  const char* const in_use_;
  const char* const left_behind_;
  bool taken_, was_left_;
  std::uint32_t left_by_;
};

// Calls work(), which throws, from a C method. False: there is a Python exception.
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

// Whether each of them, where it is an array, is one and nothing derived from it, whose numbers may mean something
// else, as those of a masked array do.
template <class... Objects>
bool are_plain(Objects*... objects) {
  return ((!objects || !PyArray_Check(objects) || PyArray_CheckExact(objects)) && ...);
}

// The arguments of a C method, in the order of its parameters; null: not passed, or None where that is the default.
constexpr int most_parameters = 3;
using Arguments = std::array<PyObject*, most_parameters>;

struct Method {
  const char* object;   // "stream"
  const char* usage;    // what the error for other arguments says
  const char* prepare;  // of Python: converts arguments that do not fit, or says what is wrong
  std::array<const char*, most_parameters> names;  // of the parameters
  int positional;                                  // so many of them may come without their name
  int required;                                    // and so many, the first ones, must come
};

// Reads the arguments of a METH_FASTCALL | METH_KEYWORDS call. False: they are others.
inline bool read_arguments(const Method& method, PyObject* const* given, Py_ssize_t count, PyObject* names,
                           Arguments& arguments) {
  if (count > method.positional) return false;
  for (Py_ssize_t i = 0; i < count; ++i) arguments[static_cast<std::size_t>(i)] = given[i];
  for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
    PyObject** place = nullptr;
    for (std::size_t n = 0; n < most_parameters; ++n)
      if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), method.names[n]) == 0) place = &arguments[n];
    if (!place || *place) return false;
    *place = given[count + i];
  }
  for (std::size_t n = 0; n < most_parameters; ++n) {
    if (static_cast<int>(n) < method.required && !arguments[n]) return false;
    if (static_cast<int>(n) >= method.required && arguments[n] == Py_None) arguments[n] = nullptr;
  }
  return true;
}

// A call of a C method: work(object, arguments) at once, where they fit as they are; else with what Python makes of
// them. fits(object, arguments, at_once) looks at arguments of a user at once, and then at those that Python has
// prepared.
template <class Object, class Fits, class Work>
PyObject* call_method(const Method& method, PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names,
                      const Fits& fits, const Work& work) {
  Object* const object = object_in<Object>(self);
  if (!object) {
    PyErr_Format(PyExc_TypeError, "%s: not initialised", method.object);
    return nullptr;
  }
  Arguments arguments{};
  if (!read_arguments(method, given, count, names, arguments)) {
    PyErr_SetString(PyExc_TypeError, method.usage);
    return nullptr;
  }
  if (are_plain(arguments[0], arguments[1], arguments[2]) && fits(*object, arguments, true))
    return work(*object, arguments);
  const auto none_if_null = [&](std::size_t n) { return arguments[n] ? arguments[n] : Py_None; };
  const auto prepared = py::reinterpret_steal<py::object>(
      PyObject_CallMethod(self, method.prepare, "OOO", none_if_null(0), none_if_null(1), none_if_null(2)));
  if (!prepared) return nullptr;
  if (PyTuple_Check(prepared.ptr()) && PyTuple_GET_SIZE(prepared.ptr()) == most_parameters) {
    for (std::size_t n = 0; n < most_parameters; ++n) {
      PyObject* const item = PyTuple_GET_ITEM(prepared.ptr(), static_cast<Py_ssize_t>(n));
      arguments[n] = item == Py_None ? nullptr : item;
    }
    if (arguments[0] && fits(*object, arguments, false)) return work(*object, arguments);
  }
  PyErr_SetString(PyExc_ValueError, "internal: prepared arrays do not fit");
  return nullptr;
}

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
