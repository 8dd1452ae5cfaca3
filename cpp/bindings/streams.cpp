// Streams: a state that advances by one step or several steps a call. step(x, out) and run(x, out) are C methods
// without conversions: no allocation, no lock, no system call.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "../core/window.hpp"
#include "interruption.hpp"
#include "method.hpp"
#include "networks.hpp"

#include <numpy/arrayscalars.h>

namespace gatewise {
namespace {

// Bytes of scratch that a stream keeps for its runs. Longer runs take theirs from the store of recycled memory.
constexpr std::size_t max_block_scratch = std::size_t(1) << 20;

struct Stream {
  std::shared_ptr<const HeldNetwork> network;
  // With a window: the first part of the network, which is computed once for each input; null: there is no such part.
  std::shared_ptr<const HeldNetwork> head;
  // New weights leave these as they are, so that arguments can be checked before the stream is taken into use.
  const int type_number;
  const bool takes_tokens;
  const Size input, output, batch;
  const bool unbatched, batch_first, takes_resets;
  StateBlock state;
  StateBlock saved_state;            // from before a run that may be interrupted
  Size operations = 0;               // of a step
  Buffer scratch;                    // of a step
  Run one_step;                      // laid out in `scratch`
  std::unique_ptr<Window> window;    // takes the place of `one_step`; null: the state goes on for ever
  std::vector<std::int64_t> tokens;  // of one step, or of the steps [T, B] of a run
  std::vector<std::uint8_t> resets;  // [T, B] of a run
  std::unique_ptr<Run> block;        // the steps of a run, laid out anew in each run
  Buffer block_scratch;
  Occupancy occupancy;

  Stream(std::shared_ptr<const HeldNetwork> first_network, Size batch, bool unbatched,
         std::shared_ptr<const HeldNetwork> first_head, Size window_steps, bool batch_first)
      : type_number(present(first_network)->type_number()),
        takes_tokens((first_head ? first_head : first_network)->takes_tokens()),
        input((first_head ? first_head : first_network)->input()),
        output(first_network->output()),
        batch(batch),
        unbatched(unbatched),
        batch_first(batch_first && !unbatched),
        takes_resets(window_steps > 0 || !first_network->masks_or_reverses()),
        state(*first_network, window_steps ? 0 : batch),
        saved_state(*first_network, window_steps ? 0 : batch),
        tokens(static_cast<std::size_t>(takes_tokens ? batch : 0)),
        block(std::make_unique<Run>()) {
    if (batch < 1 || (unbatched && batch != 1)) throw py::value_error("internal: rows that do not fit");
    if (first_head && (window_steps == 0 || first_head->output() != first_network->input() ||
                       first_head->kernels != first_network->kernels))
      throw py::value_error("internal: a head that does not fit");
    if (window_steps < 0 || (window_steps > 0 && first_network->nodes.front().kind == Node::Kind::lookup))
      throw py::value_error("internal: a window that does not fit");
    take_network(std::move(first_network), std::move(first_head), window_steps);
  }

  // Takes other weights of the same sizes and keeps the state. If memory is short, nothing changes.
  void take_network(std::shared_ptr<const HeldNetwork> new_network, std::shared_ptr<const HeldNetwork> new_head,
                    Size window_steps) {
    if (window_steps > 0) {
      without_gil(gil_operations, [&] {
        auto new_window = std::make_unique<Window>(new_head.get(), *new_network, window_steps, batch);
        if (window) new_window->take_inputs(*window);
        window = std::move(new_window);
      });
    } else {
      Run step;
      step.lay_out(*new_network, 1, batch, {}, 1);  // a step starts no thread
      Buffer new_scratch(static_cast<std::size_t>(step.bytes()));
      step.place(new_scratch.data(), state.pointers.data(), state.pointers.data());
      scratch = std::move(new_scratch);
      one_step = std::move(step);
    }
    network = std::move(new_network);
    head = std::move(new_head);
    operations = network->operations(batch);
  }

  void run_step(const NetworkInput& x, Rows<void*> out, const npy_bool* flags, Interrupt* interrupt) {
    if (window) {
      (*window)(x, out, 1, flags, interrupt);
      return;
    }
    if (flags) reset(flags);
    one_step(x, out, nullptr);
  }

  // An interrupted run leaves the state as it was before.
  void run_steps(const NetworkInput& x, Rows<void*> out, Size steps, const std::uint8_t* flags, Interrupt* interrupt) {
    if (window) {
      (*window)(x, out, steps, flags, interrupt);
      return;
    }
    Schedule schedule{};
    schedule.resets = flags;
    block->lay_out(*network, steps, batch, schedule, 0);
    const auto bytes = static_cast<std::size_t>(block->bytes());
    Buffer scratch_of_long_run;
    if (bytes > max_block_scratch)
      scratch_of_long_run = Buffer(bytes);
    else if (bytes > block_scratch.bytes())
      block_scratch = Buffer(bytes);
    block->place((scratch_of_long_run.data() ? scratch_of_long_run : block_scratch).data(), state.pointers.data(),
                 state.pointers.data());
    if (operations_of_run(steps) < look_operations) interrupt = nullptr;
    if (interrupt) saved_state.copy_from(state);
    if ((*block)(x, out, interrupt) == Status::interrupted) state.copy_from(saved_state);
  }

  void release_long_block() {
    if (tokens.size() * sizeof tokens[0] > max_block_scratch && tokens.size() > static_cast<std::size_t>(batch)) {
      tokens.resize(static_cast<std::size_t>(batch));
      tokens.shrink_to_fit();
    }
    if (resets.size() > max_block_scratch) resets = {};
  }

  Size operations_of_run(Size steps) const {
    return window ? gil_operations : operations * std::clamp<Size>(steps, 1, look_operations);
  }

  // Makes the stream usable again after a fork in the middle of a call, before its state is set. Nothing else that the
  // call may have been changing is trusted, or even freed.
  void renew() {
    auto new_block = std::make_unique<Run>();
    auto* const old_scratch = new Buffer;
    std::unique_ptr<Window> new_window;
    if (window) new_window = std::make_unique<Window>(head.get(), *network, window->steps(), batch);
    // Nothing below can fail.
    static_cast<void>(block.release());
    static_cast<void>(window.release());
    std::swap(*old_scratch, block_scratch);
    block = std::move(new_block);
    window = std::move(new_window);
  }

  // Zeroes the state of the rows that are flagged.
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

struct StreamUse : ExclusiveUse {
  explicit StreamUse(Stream& stream, bool takes_abandoned = false)
      : ExclusiveUse(stream.occupancy, "this stream is in use by another thread; give each thread a stream.copy()",
                     "this stream was in use by another thread when the process forked; reset() it first",
                     takes_abandoned) {
    if (!*this || !was_abandoned()) return;
    try {
      stream.renew();
    } catch (...) {
      abandon();
      throw;
    }
  }
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

// Whether a table has a token; else there is a Python exception.
bool is_known(const Stream& stream, std::int64_t token) {
  if (token >= 0 && token < stream.input) return true;
  refuse_token(stream.input, token);
  return false;
}

// Copies the tokens, since another thread may write to the array meanwhile. Returns false, with a Python exception, if
// one is out of range.
bool take_tokens(Stream& stream, PyObject* object) {
  for (Size row = 0; row < stream.batch; ++row) {
    int overflow = 0;
    const std::int64_t token =
        PyLong_CheckExact(object) ? PyLong_AsLongLongAndOverflow(object, &overflow)
        : PyArray_IsScalar(object, Int64)
            ? PyArrayScalar_VAL(object, Int64)
            : static_cast<const volatile std::int64_t*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(object)))[row];
    if (overflow) {
      PyErr_Format(PyExc_ValueError, "x: expected numbers from 0 to %zd, got %S", stream.input - 1, object);
      return false;
    }
    if (!is_known(stream, token)) return false;
    stream.tokens[static_cast<std::size_t>(row)] = token;
  }
  return true;
}

// The flags of a bool array [] or [B], or of a single bool; null for other objects.
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

// x of a step: (I,) or (B, I); of a run: (T, I), (T, B, I) or (B, T, I); tokens: the same without I. resets has x's
// shape without I.
struct Operands {
  PyObject *x = nullptr, *out = nullptr, *resets = nullptr;
};
Operands operands_in(const Arguments& arguments) { return {arguments[0], arguments[1], arguments[2]}; }

// Whether all operands can be used as they are.
bool fits(const Stream& stream, const Operands& operands) {
  return operands.out && fits(stream, operands.out, stream.output, true) &&
         (stream.takes_tokens ? fits_as_tokens(stream, operands.x)
                              : fits(stream, operands.x, stream.input, false) && !overlap(operands.x, operands.out)) &&
         (!operands.resets || flags_of(stream, operands.resets));
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_step(Stream& stream, const Operands& operands) {
  const StreamUse use(stream);
  if (!use) {
    PyErr_SetString(PyExc_RuntimeError, use.refusal());
    return nullptr;
  }
  NetworkInput input{{nullptr, 0, stream.input}, stream.takes_tokens ? stream.tokens.data() : nullptr};
  if (!stream.takes_tokens)
    input.rows.data = PyArray_DATA(reinterpret_cast<PyArrayObject*>(operands.x));
  else if (!take_tokens(stream, operands.x))
    return nullptr;
  const npy_bool* const flags = operands.resets ? flags_of(stream, operands.resets) : nullptr;
  const Rows<void*> output{PyArray_DATA(reinterpret_cast<PyArrayObject*>(operands.out)), 0, stream.output};
  // A step of a window walks over all its inputs, and its memory may have to grow.
  const bool is_done = without_exceptions([&] {
    without_gil(stream.window ? gil_operations : stream.operations,
                [&](Interrupt* interrupt) { stream.run_step(input, output, flags, interrupt); });
  });
  return is_done ? Py_NewRef(operands.out) : nullptr;
}

constexpr Method step_method{"stream",
                             "step: expected step(x), step(x, out) or step(x, out, resets=flags)",
                             "_prepare_step",
                             {"x", "out", "resets"},
                             2,
                             1};

PyObject* step(PyObject* self, PyObject* const* values, Py_ssize_t count, PyObject* names) {
  return call_method<Stream>(
      step_method, self, values, count, names,
      [](const Stream& stream, const Arguments& arguments, bool) { return fits(stream, operands_in(arguments)); },
      [](Stream& stream, const Arguments& arguments) { return run_step(stream, operands_in(arguments)); });
}

// ---- run --------------------------------------------------------------------------------------------------------

PyArrayObject* as_array(PyObject* object) { return reinterpret_cast<PyArrayObject*>(object); }

// The axes of an array of a run. The axis of the values, if there is one, comes last.
Size steps_of(const Stream& stream, PyObject* object) { return PyArray_DIM(as_array(object), stream.batch_first); }
Size step_stride(const Stream& stream, PyObject* object) {
  return PyArray_STRIDE(as_array(object), stream.batch_first);
}
Size row_stride(const Stream& stream, PyObject* object) {
  return stream.unbatched ? 0 : PyArray_STRIDE(as_array(object), !stream.batch_first);
}

// Whether `object` is an array of this type that has, for each step and row, `units` values, or one value if units is
// -1.
bool fits_array(const Stream& stream, PyObject* object, int type_number, Size units) {
  if (!PyArray_Check(object)) return false;
  PyArrayObject* const array = as_array(object);
  const int axes = stream.unbatched ? 1 : 2;
  return PyArray_TYPE(array) == type_number && PyArray_ISNOTSWAPPED(array) && PyArray_ISALIGNED(array) &&
         PyArray_NDIM(array) == axes + (units >= 0) &&
         (stream.unbatched || PyArray_DIM(array, !stream.batch_first) == stream.batch) &&
         (units < 0 || PyArray_DIM(array, axes) == units);
}

// Whether the values of the array can be read or written as they are.
bool has_plain_values(PyObject* object) {
  PyArrayObject* const array = as_array(object);
  const Size item = PyArray_ITEMSIZE(array);
  const int values = PyArray_NDIM(array) - 1;
  if (PyArray_SIZE(array) > 0 && PyArray_DIM(array, values) > 1 && PyArray_STRIDE(array, values) != item) return false;
  for (int axis = 0; axis < values; ++axis)
    if (PyArray_STRIDE(array, axis) % item != 0) return false;
  return true;
}

// Whether all operands can be used as they are. Does not look whether x and out overlap.
bool fits_block(const Stream& stream, const Operands& operands) {
  if (!operands.out || !fits_array(stream, operands.out, stream.type_number, stream.output) ||
      !PyArray_ISWRITEABLE(as_array(operands.out)) || !has_plain_values(operands.out))
    return false;
  if (!fits_array(stream, operands.x, stream.takes_tokens ? NPY_INT64 : stream.type_number,
                  stream.takes_tokens ? -1 : stream.input))
    return false;
  const Size steps = steps_of(stream, operands.x);
  if (steps_of(stream, operands.out) != steps || (!stream.takes_tokens && !has_plain_values(operands.x))) return false;
  if (!operands.resets) return true;
  return stream.takes_resets && fits_array(stream, operands.resets, NPY_BOOL, -1) &&
         steps_of(stream, operands.resets) == steps;
}

bool is_contiguous(PyObject* object) { return PyArray_IS_C_CONTIGUOUS(as_array(object)); }

// The value of step t and row b. Another thread may write to the array meanwhile.
template <class Value>
Value value_at(const Stream& stream, PyObject* object, Size t, Size b) {
  const char* const data = PyArray_BYTES(as_array(object));
  return *reinterpret_cast<const volatile Value*>(data + t * step_stride(stream, object) +
                                                  b * row_stride(stream, object));
}

// Copies tokens and flags [T, B]; `resets` points to the flags if any is set. Returns false, with a Python exception,
// if a token is out of range.
bool take_block(Stream& stream, const Operands& operands, Size steps, const std::uint8_t*& resets) {
  const auto count = static_cast<std::size_t>(steps * stream.batch);
  if (stream.takes_tokens && stream.tokens.size() < count) stream.tokens.resize(count);
  if (operands.resets && stream.resets.size() < count) stream.resets.resize(count);
  std::size_t place = 0;
  for (Size t = 0; t < steps && (stream.takes_tokens || operands.resets); ++t)
    for (Size b = 0; b < stream.batch; ++b, ++place) {
      if (operands.resets) {
        stream.resets[place] = value_at<npy_bool>(stream, operands.resets, t, b) != 0;
        if (stream.resets[place]) resets = stream.resets.data();
      }
      if (!stream.takes_tokens) continue;
      stream.tokens[place] = value_at<std::int64_t>(stream, operands.x, t, b);
      if (!is_known(stream, stream.tokens[place])) return false;
    }
  return true;
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_block(Stream& stream, const Operands& operands) {
  const StreamUse use(stream);
  if (!use) {
    PyErr_SetString(PyExc_RuntimeError, use.refusal());
    return nullptr;
  }
  const Size steps = steps_of(stream, operands.x), item = PyArray_ITEMSIZE(as_array(operands.out));
  const bool is_done = without_exceptions([&] {
    const std::uint8_t* resets = nullptr;
    if (!take_block(stream, operands, steps, resets)) throw py::error_already_set();
    const auto rows_of_array = [&](PyObject* object) {
      return Rows<void*>{PyArray_DATA(as_array(object)), step_stride(stream, object) / item,
                         row_stride(stream, object) / item};
    };
    NetworkInput input{{}, stream.takes_tokens ? stream.tokens.data() : nullptr};
    if (!stream.takes_tokens) {
      const Rows<void*> rows = rows_of_array(operands.x);
      input.rows = {rows.data, rows.step, rows.row};
    }
    const Rows<void*> output = rows_of_array(operands.out);
    without_gil(stream.operations_of_run(steps),
                [&](Interrupt* interrupt) { stream.run_steps(input, output, steps, resets, interrupt); });
  });
  stream.release_long_block();
  return is_done ? Py_NewRef(operands.out) : nullptr;
}

constexpr Method run_method{"stream",
                            "run: expected run(x), run(x, out) or run(x, out, resets=flags)",
                            "_prepare_run",
                            {"x", "out", "resets"},
                            2,
                            1};

PyObject* run(PyObject* self, PyObject* const* values, Py_ssize_t count, PyObject* names) {
  return call_method<Stream>(
      run_method, self, values, count, names,
      [](const Stream& stream, const Arguments& arguments, bool at_once) {
        const Operands block = operands_in(arguments);
        // Of arrays with other strides, Python finds out whether they overlap.
        return fits_block(stream, block) &&
               (!at_once || (is_contiguous(block.x) && is_contiguous(block.out) && !overlap(block.x, block.out)));
      },
      [](Stream& stream, const Arguments& arguments) { return run_block(stream, operands_in(arguments)); });
}

// ---- state and window --------------------------------------------------------------------------------------------

// Resets the rows that are flagged in a bool array [] or [B].
void reset(Stream& stream, const py::array& rows) {
  const npy_bool* flags = flags_of(stream, rows.ptr());
  if (!flags) throw py::value_error("internal: flags of the wrong dtype or size");
  const bool all_rows = std::all_of(flags, flags + stream.batch, [](npy_bool flag) { return flag; });
  const StreamUse use(stream, all_rows);
  use.require();
  stream.reset(flags);
}

void get_state(Stream& stream, const std::vector<py::array>& parts) {
  const StreamUse use(stream);
  use.require();
  stream.state.copy_out(parts);
}

void set_state(Stream& stream, const std::vector<py::array>& parts) {
  stream.state.check(parts);
  const StreamUse use(stream, true);
  use.require();
  stream.state.copy_in(parts);
}

void require_window(const Stream& stream) {
  if (!stream.window) throw py::value_error("internal: no window");
}

// How many inputs the window has of each row.
std::vector<Size> window_counts(Stream& stream) {
  const StreamUse use(stream);
  use.require();
  require_window(stream);
  std::vector<Size> counts;
  for (Size row = 0; row < stream.batch; ++row) counts.push_back(stream.window->count(row));
  return counts;
}

// Writes the last counts[row] inputs of each row to the beginning of inputs [n, B, I], or of tokens [n, B].
void get_window(Stream& stream, py::array& inputs, const std::vector<Size>& counts) {
  const StreamUse use(stream);
  use.require();
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

// Gives the window, for each row, the last counts[row] of inputs [n, B, I], or of tokens [n, B].
void set_window(Stream& stream, const py::array& inputs, const std::vector<Size>& counts) {
  const StreamUse use(stream);
  use.require();
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
  without_gil(gil_operations, [&] {
    for (Size i = 0; i < steps; ++i) {
      for (Size row = 0; row < stream.batch; ++row)
        if (steps - i == counts[static_cast<std::size_t>(row)]) stream.window->forget(row);
      stream.window->remember(from + i * bytes, stream.window->input_bytes());
    }
  });
  for (Size row = 0; row < stream.batch; ++row)
    if (counts[static_cast<std::size_t>(row)] == 0) stream.window->forget(row);
}

PyMethodDef methods[] = {
    {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL | METH_KEYWORDS,
     "step($self, x, out=None, *, resets=None)\n--\n\n"
     "One step. x (I,) or (B, I), tokens () or (B,); out (O,) or (B, O). Rows that are flagged in resets () or "
     "(B,)\nstart from zero. With `out`, and resets of bool if any, nothing is converted and "
     "nothing\nallocated; without it x is converted and a new array returned."},
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL | METH_KEYWORDS,
     R"(run($self, x, out=None, *, resets=None)
--

Several steps in one call, the same bits as one by one.

With `out`, contiguous arrays and resets of bool if any, nothing is converted, and once a run of as many steps has been
done nothing is allocated. Ctrl-C interrupts a long run; the state is then as it was before.

Parameters
----------
x : array_like
    (T, input_size); with batch_size B (T, B, input_size), or (B, T, input_size) if the layer is batch_first.
    Tokens have no last axis.
out : ndarray, optional
    Where to write the output, as in the layer's call.
resets : array_like of bools or of numbers that are 0 or 1, optional
    (T, B) in the order of x's axes, unbatched (T,): where the state is set to zero before the step.

Returns
-------
ndarray
    The outputs in the order of x's axes; `out` if it was operands.)"}};

}  // namespace

void bind_streams(py::module_& module) {
  using namespace py::literals;
  py::class_<Stream> type(module, "Stream");
  type.def(py::init<std::shared_ptr<const HeldNetwork>, Size, bool, std::shared_ptr<const HeldNetwork>, Size, bool>(),
           "network"_a, "batch"_a, "unbatched"_a, "head"_a = nullptr, "window"_a = 0, "batch_first"_a = false)
      .def("_window_counts", window_counts)
      .def("_get_window", get_window, "inputs"_a, "counts"_a)
      .def("_set_window", set_window, "inputs"_a, "counts"_a)
      .def("_reset", reset, "rows"_a)
      .def("_get_state", get_state, "parts"_a)
      .def("_set_state", set_state, "parts"_a)
      .def(
          "_use",
          [](Stream& stream, std::shared_ptr<const HeldNetwork> network, std::shared_ptr<const HeldNetwork> head) {
            const StreamUse use(stream);
            use.require();
            if (!present(network)->is_like(*stream.network) || !head != !stream.head ||
                (head && !head->is_like(*stream.head)))
              throw py::value_error("internal: a network of other sizes");
            stream.take_network(std::move(network), std::move(head), stream.window ? stream.window->steps() : 0);
          },
          "network"_a, "head"_a = nullptr)
      .def_property_readonly("_backend", [](Stream& stream) {
        const StreamUse use(stream);
        use.require();
        return stream.network->kernels->level;
      });
  // pybind11's own methods cost four allocations and 300 ns for two arrays; a plain C method costs none and 20 ns.
  for (PyMethodDef& method : methods)
    type.attr(method.ml_name) =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &method));
}

}  // namespace gatewise
