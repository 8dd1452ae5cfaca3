// Streams: a state that advances one step, or some, at a time. step(x, out) is a C method without conversions: no
// allocation, no lock, no system call.
#include <atomic>
#include <cstring>

#include "method.hpp"

#include <numpy/arrayscalars.h>

namespace gatewise {
namespace {

struct Stream {
  std::shared_ptr<const Packed> packed;
  // What no refresh changes, so that arguments can be checked before the turn is taken.
  const int type_number;
  const Size item, input, recurrent, cell_size, layers, batch;
  const bool unbatched;
  Buffer hidden, cell;  // [L, B, R], [L, B, H]
  Buffer scratch;       // for one step
  Forward call{};       // one step, complete but for x and out
  std::atomic<bool> busy{false};

  Stream(std::shared_ptr<const Packed> weights, Size batch, bool unbatched)
      : type_number(weights->type_number()),
        item(weights->kernels->item_bytes),
        input(weights->input),
        recurrent(weights->recurrent()),
        cell_size(weights->has_cell() ? weights->hidden : 0),
        layers(weights->layers),
        batch(batch),
        unbatched(unbatched) {
    use(std::move(weights));
    reset();
  }

  // Takes other weights of the same sizes; the state stays.
  void use(std::shared_ptr<const Packed> weights) {
    Forward step{};
    step.stack = weights->stack();
    step.steps = 1;
    step.batch = batch;
    step.input = {nullptr, 0, weights->input};
    step.output = {nullptr, 0, weights->output()};
    step.threads = 1;  // a step starts no thread
    Buffer new_scratch(static_cast<std::size_t>(weights->kernels->forward_scratch(step) * item));
    if (!hidden.data()) {
      hidden = Buffer(static_cast<std::size_t>(hidden_bytes()));
      cell = Buffer(static_cast<std::size_t>(cell_bytes()));
    }
    scratch = std::move(new_scratch);
    packed = std::move(weights);
    call = step;
    call.hidden_before = call.hidden_after = hidden.data();
    call.cell_before = call.cell_after = packed->has_cell() ? cell.data() : nullptr;
    call.scratch = scratch.data();
  }

  void reset() {
    std::memset(hidden.data(), 0, hidden.bytes());
    std::memset(cell.data(), 0, cell.bytes());
  }

  // Zero in the rows that are flagged.
  void reset(const npy_bool* flags) {
    for (Size row = 0; row < batch; ++row)
      for (Size layer = 0; layer < layers && flags[row]; ++layer) {
        clear_row(hidden, (layer * batch + row) * recurrent * item, recurrent * item);
        clear_row(cell, (layer * batch + row) * cell_size * item, cell_size * item);
      }
  }
  static void clear_row(const Buffer& buffer, Size offset, Size bytes) {
    std::memset(static_cast<char*>(buffer.data()) + offset, 0, static_cast<std::size_t>(bytes));
  }

  Size hidden_bytes() const { return layers * batch * recurrent * item; }
  Size cell_bytes() const { return layers * batch * cell_size * item; }
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
  return given.out && fits(stream, given.x, stream.input, false) && fits(stream, given.out, stream.recurrent, true) &&
         !overlap(given.x, given.out) && (!given.resets || flags_of(stream, given.resets));
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_step(Stream& stream, const Step& given) {
  const StreamTurn turn(stream);
  if (!turn) {
    PyErr_SetString(PyExc_RuntimeError, turn.refused());
    return nullptr;
  }
  if (given.resets) stream.reset(flags_of(stream, given.resets));
  stream.call.input.data = PyArray_DATA(reinterpret_cast<PyArrayObject*>(given.x));
  stream.call.output.data = PyArray_DATA(reinterpret_cast<PyArrayObject*>(given.out));
  without_gil(stream.packed->operations(stream.batch), [&] { stream.packed->kernels->forward(stream.call); });
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

// x [T, B, I] and output [T, B, R], with any strides.
void run(Stream& stream, const py::array& x, const py::array& output, const Plan* plan) {
  const StreamTurn turn(stream);
  turn.require();
  Forward call = sequence_call(*stream.packed, x, output, plan);
  if (call.batch != stream.batch) throw py::value_error("internal: the batch does not fit");
  call.hidden_before = call.hidden_after = stream.call.hidden_after;
  call.cell_before = call.cell_after = stream.call.cell_after;
  run_forward(*stream.packed, call);
}

// The rows that are flagged in a bool array [] or [B].
void reset(Stream& stream, const py::array& rows) {
  const npy_bool* flags = flags_of(stream, rows.ptr());
  if (!flags) throw py::value_error("internal: flags of the wrong dtype or size");
  const StreamTurn turn(stream);
  turn.require();
  stream.reset(flags);
}

void copy_bytes(void* to, const void* from, Size bytes) { std::memcpy(to, from, static_cast<std::size_t>(bytes)); }

void check_state(const Stream& stream, const py::array& hidden, const Array& cell) {
  if (hidden.nbytes() != stream.hidden_bytes() || !(hidden.flags() & py::array::c_style) ||
      cell.has_value() != (stream.cell_size > 0) ||
      (cell && (cell->nbytes() != stream.cell_bytes() || !(cell->flags() & py::array::c_style))))
    throw py::value_error("internal: a state of the wrong size");
}

void get_state(Stream& stream, py::array& hidden, std::optional<py::array>& cell) {
  check_state(stream, hidden, cell);
  const StreamTurn turn(stream);
  turn.require();
  copy_bytes(hidden.mutable_data(), stream.hidden.data(), stream.hidden_bytes());
  if (cell) copy_bytes(cell->mutable_data(), stream.cell.data(), stream.cell_bytes());
}

void set_state(Stream& stream, const py::array& hidden, const Array& cell) {
  check_state(stream, hidden, cell);
  const StreamTurn turn(stream);
  turn.require();
  copy_bytes(stream.hidden.data(), hidden.data(), stream.hidden_bytes());
  if (cell) copy_bytes(stream.cell.data(), cell->data(), stream.cell_bytes());
}

PyMethodDef step_definition = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)),
                               METH_FASTCALL | METH_KEYWORDS,
                               "step($self, x, out=None, *, resets=None)\n--\n\n"
                               "One step. x (I,) or (B, I), out (H,) or (B, H). Rows that are flagged in resets () or "
                               "(B,)\nstart from zero. With `out`, and resets of bool if any, nothing is converted and "
                               "nothing\nallocated; without it x is converted and a new array returned."};

}  // namespace

void bind_streams(py::module_& module) {
  using namespace py::literals;
  py::class_<Stream> type(module, "Stream");
  type.def(py::init<std::shared_ptr<const Packed>, Size, bool>(), "packed"_a, "batch"_a, "unbatched"_a)
      .def("_run", run, "x"_a, "output"_a, "plan"_a = nullptr)
      .def("_reset", reset, "rows"_a)
      .def("_get_state", get_state, "hidden"_a, "cell"_a)
      .def("_set_state", set_state, "hidden"_a, "cell"_a)
      .def(
          "_use",
          [](Stream& stream, std::shared_ptr<const Packed> packed) {
            const StreamTurn turn(stream);
            turn.require();
            const Packed& old = *stream.packed;
            if (packed->input != old.input || packed->hidden != old.hidden || packed->projection != old.projection ||
                packed->layers != old.layers || packed->type_number() != old.type_number() ||
                packed->layer[0].cell != old.layer[0].cell)
              throw py::value_error("internal: weights of other sizes");
            stream.use(std::move(packed));
          },
          "packed"_a)
      .def_property_readonly("_backend", [](Stream& stream) {
        const StreamTurn turn(stream);
        turn.require();
        return stream.packed->kernels->level;
      });
  // pybind11's own methods cost four allocations and 300 ns for two arrays; a plain C method costs none and 20 ns.
  type.attr("step") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &step_definition));
}

}  // namespace gatewise
