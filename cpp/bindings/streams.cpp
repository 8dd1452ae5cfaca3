// Streams: a state that advances one step, or some, at a time. step(x, out) is a C method without conversions: no
// allocation, no lock, no system call.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../core/window.hpp"
#include "method.hpp"

#include <numpy/arrayscalars.h>

namespace gatewise {
namespace {

struct Stream {
  std::shared_ptr<const HeldNetwork> network;
  // A network on the last inputs: what of it can be done once for each of them; null: nothing.
  std::shared_ptr<const HeldNetwork> head;
  // What no refresh changes, so that arguments can be checked before the turn is taken.
  const int type_number;
  const bool takes_tokens;
  const Size input, output, batch;
  const bool unbatched;
  StateBlock state;
  Size operations = 0;               // of a step
  Buffer scratch;                    // for one
  Run one_step;                      // laid out in it
  std::unique_ptr<Window> window;    // instead of it; null: the state goes on for ever
  std::vector<std::int64_t> tokens;  // of one step
  std::atomic<bool> busy{false};

  Stream(std::shared_ptr<const HeldNetwork> of, Size batch, bool unbatched, std::shared_ptr<const HeldNetwork> head_of,
         Size window_steps)
      : type_number(of->type_number()),
        takes_tokens((head_of ? head_of : of)->takes_tokens()),
        input((head_of ? head_of : of)->input()),
        output(of->output()),
        batch(batch),
        unbatched(unbatched),
        state(*of, window_steps ? 0 : batch),
        tokens(static_cast<std::size_t>(takes_tokens ? batch : 0)) {
    if (head_of && (window_steps == 0 || head_of->output() != of->input() || head_of->kernels != of->kernels))
      throw py::value_error("internal: a head that does not fit");
    if (window_steps < 0 || (window_steps > 0 && of->nodes.front().kind == Node::Kind::lookup))
      throw py::value_error("internal: a window that does not fit");
    use(std::move(of), std::move(head_of), window_steps);
  }

  // Takes other weights of the same sizes; the state stays. Where memory is short nothing changes.
  void use(std::shared_ptr<const HeldNetwork> other, std::shared_ptr<const HeldNetwork> other_head, Size window_steps) {
    if (window_steps > 0) {
      without_gil(gil_operations, [&] {
        auto fresh = std::make_unique<Window>(other_head.get(), *other, window_steps, batch);
        if (window) fresh->take_inputs(*window);
        window = std::move(fresh);
      });
    } else {
      Run step;
      step.lay_out(*other, 1, batch, {}, 1);  // a step starts no thread
      Buffer new_scratch(static_cast<std::size_t>(step.bytes()));
      step.place(new_scratch.data(), state.pointers.data(), state.pointers.data());
      scratch = std::move(new_scratch);
      one_step = std::move(step);
    }
    network = std::move(other);
    head = std::move(other_head);
    operations = network->operations(batch);
  }

  void run_step(const NetworkInput& given, Rows<void*> out) {
    if (window)
      (*window)(given, out, 1, nullptr);
    else
      one_step(given, out);
  }

  // In the rows that are flagged.
  void reset(const npy_bool* flags) {
    for (Size row = 0; row < batch; ++row) {
      if (!flags[row]) continue;
      if (window)
        window->forget(row);
      else
        state.clear_row(*network, batch, row);
    }
  }
};

struct StreamTurn : Turn {
  explicit StreamTurn(Stream& stream)
      : Turn(stream.busy, "this stream is in use by another thread; give each thread a stream.copy()") {}
};

// ---- step -------------------------------------------------------------------------------------------------------

// Whether `object` is an array of the right dtype, [units] or [B, units], that the core can use as it is.
bool fits(const Stream& stream, PyObject* object, Size units, bool writeable) {
  if (!PyArray_Check(object)) return false;
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  if (PyArray_TYPE(array) != stream.type_number || !PyArray_ISCARRAY_RO(array) ||
      (writeable && !PyArray_ISWRITEABLE(array)))
    return false;
  const npy_intp* shape = PyArray_DIMS(array);
  return stream.unbatched ? PyArray_NDIM(array) == 1 && shape[0] == units
                          : PyArray_NDIM(array) == 2 && shape[0] == stream.batch && shape[1] == units;
}

// Whether `object` is a token, or an array of one a row, that can be used as it is.
bool fits_as_tokens(const Stream& stream, PyObject* object) {
  if (stream.unbatched && (PyLong_CheckExact(object) || PyArray_IsScalar(object, Int64))) return true;
  if (!PyArray_Check(object)) return false;
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  return PyArray_TYPE(array) == NPY_INT64 && PyArray_ISCARRAY_RO(array) &&
         PyArray_NDIM(array) == (stream.unbatched ? 0 : 1) && PyArray_SIZE(array) == stream.batch;
}

// They are copied, since another thread may write to the array meanwhile. False: one is out of range, and there is a
// Python exception.
bool take_tokens(Stream& stream, PyObject* object) {
  for (Size row = 0; row < stream.batch; ++row) {
    int overflow = 0;
    const std::int64_t token =
        PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow)
        : PyArray_IsScalar(object, Int64)
            ? PyArrayScalar_VAL(object, Int64)
            : static_cast<const volatile std::int64_t*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(object)))[row];
    if (overflow || token < 0 || token >= stream.input) {
      if (overflow)
        PyErr_Format(PyExc_ValueError, "x: expected numbers from 0 to %zd, got %S", stream.input - 1, object);
      else
        refuse_token(stream.input, token);
      return false;
    }
    stream.tokens[static_cast<std::size_t>(row)] = token;
  }
  return true;
}

// The flags of a bool array [] or [B], or of a lone bool, or null.
const npy_bool* flags_of(const Stream& stream, PyObject* object) {
  static const npy_bool no = 0, yes = 1;
  if (stream.unbatched && (object == Py_True || object == PyArrayScalar_True)) return &yes;
  if (stream.unbatched && (object == Py_False || object == PyArrayScalar_False)) return &no;
  if (!PyArray_Check(object)) return nullptr;
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  const bool fitting =
      PyArray_TYPE(array) == NPY_BOOL && PyArray_ISCARRAY_RO(array) &&
      (stream.unbatched ? PyArray_NDIM(array) == 0 : PyArray_NDIM(array) == 1 && PyArray_DIM(array, 0) == stream.batch);
  return fitting ? static_cast<const npy_bool*>(PyArray_DATA(array)) : nullptr;
}

struct Step {
  PyObject *x = nullptr, *out = nullptr, *resets = nullptr;
};

// Whether all of it can be used as it is.
bool fits(const Stream& stream, const Step& given) {
  return given.out && fits(stream, given.out, stream.output, true) &&
         (stream.takes_tokens ? fits_as_tokens(stream, given.x)
                              : fits(stream, given.x, stream.input, false) && !overlap(given.x, given.out)) &&
         (!given.resets || flags_of(stream, given.resets));
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_step(Stream& stream, const Step& given) {
  const StreamTurn turn(stream);
  if (!turn) {
    PyErr_SetString(PyExc_RuntimeError, turn.refused());
    return nullptr;
  }
  NetworkInput input{{nullptr, 0, stream.input}, stream.takes_tokens ? stream.tokens.data() : nullptr};
  if (!stream.takes_tokens)
    input.rows.data = PyArray_DATA(reinterpret_cast<PyArrayObject*>(given.x));
  else if (!take_tokens(stream, given.x))
    return nullptr;
  if (given.resets) stream.reset(flags_of(stream, given.resets));
  const Rows<void*> output{PyArray_DATA(reinterpret_cast<PyArrayObject*>(given.out)), 0, stream.output};
  try {
    // A window has as many steps as come to it.
    without_gil(stream.window ? gil_operations : stream.operations, [&] { stream.run_step(input, output); });
  } catch (const std::bad_alloc&) {  // a window's memory may have to grow
    return PyErr_NoMemory();
  }
  return Py_NewRef(given.out);
}

// Anything but step(x, out) with arrays that fit: Python converts, allocates, or says what is wrong.
PyObject* step_slowly(Stream& stream, PyObject* self, const Step& given) {
  const auto none_if_null = [](PyObject* object) { return object ? object : Py_None; };
  const auto prepared = py::reinterpret_steal<py::object>(
      PyObject_CallMethod(self, "_prepare_step", "OOO", given.x, none_if_null(given.out), none_if_null(given.resets)));
  if (!prepared) return nullptr;
  Step fitting;
  if (PyTuple_Check(prepared.ptr()) && PyTuple_GET_SIZE(prepared.ptr()) == 3) {
    fitting = {PyTuple_GET_ITEM(prepared.ptr(), 0), PyTuple_GET_ITEM(prepared.ptr(), 1),
               PyTuple_GET_ITEM(prepared.ptr(), 2)};
    if (fitting.resets == Py_None) fitting.resets = nullptr;
  }
  if (!fitting.x || !fits(stream, fitting)) {
    PyErr_SetString(PyExc_ValueError, "internal: prepared arrays do not fit");
    return nullptr;
  }
  return run_step(stream, fitting);
}

PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  Stream* stream = object_in<Stream>(self);
  if (!stream) {
    PyErr_SetString(PyExc_TypeError, "stream: not initialised");
    return nullptr;
  }
  Step given;
  if (count > 0) given.x = arguments[0];
  if (count > 1) given.out = arguments[1];
  bool understood = count <= 2;
  for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
    const auto named = [&](const char* name) {
      return PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), name) == 0;
    };
    PyObject** place = named("x") ? &given.x : named("out") ? &given.out : named("resets") ? &given.resets : nullptr;
    if (place && !*place)
      *place = arguments[count + i];
    else
      understood = false;
  }
  if (!understood || !given.x) {
    PyErr_SetString(PyExc_TypeError, "step: expected step(x), step(x, out) or step(x, out, resets=flags)");
    return nullptr;
  }
  if (given.resets == Py_None) given.resets = nullptr;
  return fits(*stream, given) ? run_step(*stream, given) : step_slowly(*stream, self, given);
}

// ---- the rest ---------------------------------------------------------------------------------------------------

// x [T, B, I], with any strides, or tokens [T, B]; output [T, B, O].
void run(Stream& stream, const py::array& x, const py::array& output, const Plan* plan) {
  const StreamTurn turn(stream);
  turn.require();
  if (stream.window) {
    const Sequences given =
        sequences_of(stream.head ? *stream.head : *stream.network, x, stream.network->output(), output);
    if (given.batch != stream.batch) throw py::value_error("internal: another batch");
    const std::uint8_t* resets = plan ? plan->schedule(given.steps, given.batch).resets : nullptr;
    return without_gil(gil_operations, [&] { (*stream.window)(given.input, given.output, given.steps, resets); });
  }
  const std::vector<const void*> before(stream.state.pointers.begin(), stream.state.pointers.end());
  run_network(*stream.network, x, before, output, stream.state.pointers, stream.batch, plan);
}

// The rows that are flagged in a bool array [] or [B].
void reset(Stream& stream, const py::array& rows) {
  const npy_bool* flags = flags_of(stream, rows.ptr());
  if (!flags) throw py::value_error("internal: flags of the wrong dtype or size");
  const StreamTurn turn(stream);
  turn.require();
  stream.reset(flags);
}

void get_state(Stream& stream, const std::vector<py::array>& parts) {
  const StreamTurn turn(stream);
  turn.require();
  stream.state.copy_out(parts);
}

void set_state(Stream& stream, const std::vector<py::array>& parts) {
  const StreamTurn turn(stream);
  turn.require();
  stream.state.copy_in(parts);
}

void require_window(const Stream& stream) {
  if (!stream.window) throw py::value_error("internal: no window");
}

// How many inputs each row has.
std::vector<Size> window_counts(Stream& stream) {
  const StreamTurn turn(stream);
  turn.require();
  require_window(stream);
  std::vector<Size> counts;
  for (Size row = 0; row < stream.batch; ++row) counts.push_back(stream.window->count(row));
  return counts;
}

// inputs [n, B, I] or tokens [n, B]: of each row the last `counts`, from the front on; the others stay as they are.
void get_window(Stream& stream, py::array& inputs, const std::vector<Size>& counts) {
  const StreamTurn turn(stream);
  turn.require();
  require_window(stream);
  const Size bytes = stream.window->input_bytes(), steps = inputs.ndim() ? inputs.shape(0) : 0;
  if (static_cast<Size>(counts.size()) != stream.batch || inputs.nbytes() != steps * stream.batch * bytes ||
      !(inputs.flags() & py::array::c_style))
    throw py::value_error("internal: inputs that do not fit");
  auto* to = static_cast<char*>(inputs.mutable_data());
  for (Size row = 0; row < stream.batch; ++row) {
    const Size count = counts[static_cast<std::size_t>(row)];
    if (count > steps || count > stream.window->count(row)) throw py::value_error("internal: too many inputs");
    for (Size i = 0; i < count; ++i)
      std::memcpy(to + (i * stream.batch + row) * bytes, stream.window->input(row, count - i),
                  static_cast<std::size_t>(bytes));
  }
}

// inputs [n, B, I] or tokens [n, B], whose last `counts` of each row are the ones.
void set_window(Stream& stream, const py::array& inputs, const std::vector<Size>& counts) {
  const StreamTurn turn(stream);
  turn.require();
  require_window(stream);
  const Size bytes = stream.window->input_bytes() * stream.batch, steps = inputs.ndim() ? inputs.shape(0) : 0;
  if (static_cast<Size>(counts.size()) != stream.batch || inputs.nbytes() != steps * bytes ||
      !(inputs.flags() & py::array::c_style) ||
      std::any_of(counts.begin(), counts.end(), [&](Size count) { return count < 0 || count > steps; }))
    throw py::value_error("internal: inputs that do not fit");
  const auto* from = static_cast<const char*>(inputs.data());
  if (stream.takes_tokens)
    for (Size i = 0; i < steps * stream.batch; ++i)
      if (const auto token = reinterpret_cast<const std::int64_t*>(from)[i]; token < 0 || token >= stream.input)
        throw py::value_error("internal: a token that the table does not have");
  for (Size row = 0; row < stream.batch; ++row) stream.window->forget(row);
  for (Size i = 0; i < steps; ++i) {
    for (Size row = 0; row < stream.batch; ++row)
      if (steps - i == counts[static_cast<std::size_t>(row)]) stream.window->forget(row);
    stream.window->remember(from + i * bytes, stream.window->input_bytes());
  }
  for (Size row = 0; row < stream.batch; ++row)
    if (counts[static_cast<std::size_t>(row)] == 0) stream.window->forget(row);
}

PyMethodDef step_definition = {
    "step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL | METH_KEYWORDS,
    "step($self, x, out=None, *, resets=None)\n--\n\n"
    "One step. x (I,) or (B, I), tokens () or (B,); out (O,) or (B, O). Rows that are flagged in resets () or "
    "(B,)\nstart from zero. With `out`, and resets of bool if any, nothing is converted and "
    "nothing\nallocated; without it x is converted and a new array returned."};

}  // namespace

void bind_streams(py::module_& module) {
  using namespace py::literals;
  py::class_<Stream> type(module, "Stream");
  type.def(py::init<std::shared_ptr<const HeldNetwork>, Size, bool, std::shared_ptr<const HeldNetwork>, Size>(),
           "network"_a, "batch"_a, "unbatched"_a, "head"_a = nullptr, "window"_a = 0)
      .def("_window_counts", window_counts)
      .def("_get_window", get_window, "inputs"_a, "counts"_a)
      .def("_set_window", set_window, "inputs"_a, "counts"_a)
      .def("_run", run, "x"_a, "output"_a, "plan"_a = nullptr)
      .def("_reset", reset, "rows"_a)
      .def("_get_state", get_state, "parts"_a)
      .def("_set_state", set_state, "parts"_a)
      .def(
          "_use",
          [](Stream& stream, std::shared_ptr<const HeldNetwork> network, std::shared_ptr<const HeldNetwork> head) {
            const StreamTurn turn(stream);
            turn.require();
            if (!network->is_like(*stream.network) || !head != !stream.head || (head && !head->is_like(*stream.head)))
              throw py::value_error("internal: a network of other sizes");
            stream.use(std::move(network), std::move(head), stream.window ? stream.window->steps() : 0);
          },
          "network"_a, "head"_a = nullptr)
      .def_property_readonly("_backend", [](Stream& stream) {
        const StreamTurn turn(stream);
        turn.require();
        return stream.network->kernels->level;
      });
  // pybind11's own methods cost four allocations and 300 ns for two arrays; a plain C method costs none and 20 ns.
  type.attr("step") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &step_definition));
}

}  // namespace gatewise
