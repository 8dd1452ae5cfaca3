// What the plain C methods share, which pybind11's conversions would cost more than the work they call: step and run of
// a stream, step of a pool.
#pragma once

#include <atomic>
#include <initializer_list>
#include <stdexcept>
#include <utility>

#include "../core/forks.hpp"
#include "python.hpp"

namespace gatewise {

// The object in a Python object, whose type the method descriptor has checked; null before __init__, and where a class
// inherits from two of ours.
template <class Object>
Object* object_in(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  return instance->simple_layout ? static_cast<Object*>(instance->simple_value_holder[0]) : nullptr;
}

// A parameter by name and where its argument goes: null, if it was not passed.
struct Parameter {
  const char* name;
  PyObject** argument;
};

// Reads the arguments of a METH_FASTCALL | METH_KEYWORDS call, of which the first `positional` parameters may come
// without a name. False: they are others.
inline bool read_arguments(PyObject* const* arguments, Py_ssize_t count, PyObject* names, Py_ssize_t positional,
                           std::initializer_list<Parameter> parameters) {
  if (count > positional) return false;
  for (Py_ssize_t i = 0; i < count; ++i) *parameters.begin()[i].argument = arguments[i];
  for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
    PyObject** place = nullptr;
    for (const Parameter& parameter : parameters)
      if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), parameter.name) == 0) place = parameter.argument;
    if (!place || *place) return false;
    *place = arguments[count + i];
  }
  return true;
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
