// Streams: a state that advances one step, or some, at a time. step(x, out) and run(x, out) are C methods without
// conversions: no allocation, no lock, no system call.
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

// What a stream keeps for its runs; longer ones take theirs from the store of recycled memory.
constexpr std::size_t most_block_scratch = std::size_t(1) << 20;

struct Stream {
  std::shared_ptr<const HeldNetwork> network;
  // A network on the last inputs: what of it can be done once for each of them; null: nothing.
  std::shared_ptr<const HeldNetwork> head;
  // What no refresh changes, so that arguments can be checked before the turn is taken.
  const int type_number;
  const bool takes_tokens;
  const Size input, output, batch;
  const bool unbatched, batch_first, takes_resets;
  StateBlock state;
  StateBlock saved_state;            // as it was before a run that may be interrupted
  Size operations = 0;               // of a step
  Buffer scratch;                    // for one
  Run one_step;                      // laid out in it
  std::unique_ptr<Window> window;    // instead of it; null: the state goes on for ever
  std::vector<std::int64_t> tokens;  // of one step, or of the steps [T, B] of a run
  std::vector<std::uint8_t> resets;  // [T, B] of a run
  std::unique_ptr<Run> block;        // some steps, laid out anew in each run
  Buffer block_scratch;
  Turns turns;

  Stream(std::shared_ptr<const HeldNetwork> of, Size batch, bool unbatched, std::shared_ptr<const HeldNetwork> head_of,
         Size window_steps, bool batch_first)
      : type_number(present(of)->type_number()),
        takes_tokens((head_of ? head_of : of)->takes_tokens()),
        input((head_of ? head_of : of)->input()),
        output(of->output()),
        batch(batch),
        unbatched(unbatched),
        batch_first(batch_first && !unbatched),
        takes_resets(window_steps > 0 || !of->masks_or_reverses()),
        state(*of, window_steps ? 0 : batch),
        saved_state(*of, window_steps ? 0 : batch),
        tokens(static_cast<std::size_t>(takes_tokens ? batch : 0)),
        block(std::make_unique<Run>()) {
    if (batch < 1 || (unbatched && batch != 1)) throw py::value_error("internal: rows that do not fit");
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

  void run_step(const NetworkInput& given, Rows<void*> out, const npy_bool* flags, Interrupt* interrupt) {
    if (window) {
      (*window)(given, out, 1, flags, interrupt);
      return;
    }
    if (flags) reset(flags);
    one_step(given, out, nullptr);
  }

  // Interrupted, the state is as before.
  void run_steps(const NetworkInput& given, Rows<void*> out, Size steps, const std::uint8_t* flags,
                 Interrupt* interrupt) {
    if (window) {
      (*window)(given, out, steps, flags, interrupt);
      return;
    }
    Schedule schedule{};
    schedule.resets = flags;
    block->lay_out(*network, steps, batch, schedule, 0);
    const auto bytes = static_cast<std::size_t>(block->bytes());
    Buffer of_long_run;
    if (bytes > most_block_scratch)
      of_long_run = Buffer(bytes);
    else if (bytes > block_scratch.bytes())
      block_scratch = Buffer(bytes);
    block->place((of_long_run.data() ? of_long_run : block_scratch).data(), state.pointers.data(),
                 state.pointers.data());
    if (operations_of_run(steps) < look_operations) interrupt = nullptr;
    if (interrupt) saved_state.copy_from(state);
    if ((*block)(given, out, interrupt) == Status::interrupted) state.copy_from(saved_state);
  }

  void forget_long_block() {
    if (tokens.size() * sizeof tokens[0] > most_block_scratch && tokens.size() > static_cast<std::size_t>(batch)) {
      tokens.resize(static_cast<std::size_t>(batch));
      tokens.shrink_to_fit();
    }
    if (resets.size() > most_block_scratch) resets = {};
  }

  Size operations_of_run(Size steps) const {
    return window ? gil_operations : operations * std::clamp<Size>(steps, 1, look_operations);
  }

  // For what a fork left behind in the middle of a call: the state is to be set, and nothing else that the call may
  // have been changing is trusted, not even to be freed.
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
  explicit StreamTurn(Stream& stream, bool takes_left = false)
      : Turn(stream.turns, "this stream is in use by another thread; give each thread a stream.copy()",
             "this stream was in use by another thread when the process forked; reset() it first", takes_left) {
    if (!*this || !was_left()) return;
    try {
      stream.renew();
    } catch (...) {
      leave();
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
    if (overflow) {
      PyErr_Format(PyExc_ValueError, "x: expected numbers from 0 to %zd, got %S", stream.input - 1, object);
      return false;
    }
    if (!is_known(stream, token)) return false;
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

// Of a step: x (I,) or (B, I), or tokens without I; of a run: (T, I), (T, B, I) or (B, T, I), likewise. resets has x's
// shape but for I.
struct Given {
  PyObject *x = nullptr, *out = nullptr, *resets = nullptr;
};
Given given_in(const Arguments& arguments) { return {arguments[0], arguments[1], arguments[2]}; }

// Whether all of it can be used as it is.
bool fits(const Stream& stream, const Given& given) {
  return given.out && fits(stream, given.out, stream.output, true) &&
         (stream.takes_tokens ? fits_as_tokens(stream, given.x)
                              : fits(stream, given.x, stream.input, false) && !overlap(given.x, given.out)) &&
         (!given.resets || flags_of(stream, given.resets));
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_step(Stream& stream, const Given& given) {
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
  const npy_bool* const flags = given.resets ? flags_of(stream, given.resets) : nullptr;
  const Rows<void*> output{PyArray_DATA(reinterpret_cast<PyArrayObject*>(given.out)), 0, stream.output};
  // A window has as many steps as come to it, and its memory may have to grow.
  const bool is_done = without_exceptions([&] {
    without_gil(stream.window ? gil_operations : stream.operations,
                [&](Interrupt* interrupt) { stream.run_step(input, output, flags, interrupt); });
  });
  return is_done ? Py_NewRef(given.out) : nullptr;
}

constexpr Method step_method{"stream",
                             "step: expected step(x), step(x, out) or step(x, out, resets=flags)",
                             "_prepare_step",
                             {"x", "out", "resets"},
                             2,
                             1};

PyObject* step(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
  return call_method<Stream>(
      step_method, self, given, count, names,
      [](const Stream& stream, const Arguments& arguments, bool) { return fits(stream, given_in(arguments)); },
      [](Stream& stream, const Arguments& arguments) { return run_step(stream, given_in(arguments)); });
}

// ---- run --------------------------------------------------------------------------------------------------------

PyArrayObject* as_array(PyObject* object) { return reinterpret_cast<PyArrayObject*>(object); }

// The axes of an array of a run, of which those of the values come last.
Size steps_of(const Stream& stream, PyObject* object) { return PyArray_DIM(as_array(object), stream.batch_first); }
Size step_stride(const Stream& stream, PyObject* object) {
  return PyArray_STRIDE(as_array(object), stream.batch_first);
}
Size row_stride(const Stream& stream, PyObject* object) {
  return stream.unbatched ? 0 : PyArray_STRIDE(as_array(object), !stream.batch_first);
}

// Whether `object` is an array of this type for each step and row, with values [units], or one value where units is -1.
bool fits_array(const Stream& stream, PyObject* object, int type_number, Size units) {
  if (!PyArray_Check(object)) return false;
  PyArrayObject* const array = as_array(object);
  const int axes = stream.unbatched ? 1 : 2;
  return PyArray_TYPE(array) == type_number && PyArray_ISNOTSWAPPED(array) && PyArray_ISALIGNED(array) &&
         PyArray_NDIM(array) == axes + (units >= 0) &&
         (stream.unbatched || PyArray_DIM(array, !stream.batch_first) == stream.batch) &&
         (units < 0 || PyArray_DIM(array, axes) == units);
}

// Whether its values can be read or written as they are.
bool has_plain_values(PyObject* object) {
  PyArrayObject* const array = as_array(object);
  const Size item = PyArray_ITEMSIZE(array);
  const int values = PyArray_NDIM(array) - 1;
  if (PyArray_SIZE(array) > 0 && PyArray_DIM(array, values) > 1 && PyArray_STRIDE(array, values) != item) return false;
  for (int axis = 0; axis < values; ++axis)
    if (PyArray_STRIDE(array, axis) % item != 0) return false;
  return true;
}

// Whether all of it can be used as it is, but for an overlap of x and out.
bool fits_block(const Stream& stream, const Given& given) {
  if (!given.out || !fits_array(stream, given.out, stream.type_number, stream.output) ||
      !PyArray_ISWRITEABLE(as_array(given.out)) || !has_plain_values(given.out))
    return false;
  if (!fits_array(stream, given.x, stream.takes_tokens ? NPY_INT64 : stream.type_number,
                  stream.takes_tokens ? -1 : stream.input))
    return false;
  const Size steps = steps_of(stream, given.x);
  if (steps_of(stream, given.out) != steps || (!stream.takes_tokens && !has_plain_values(given.x))) return false;
  if (!given.resets) return true;
  return stream.takes_resets && fits_array(stream, given.resets, NPY_BOOL, -1) &&
         steps_of(stream, given.resets) == steps;
}

bool is_contiguous(PyObject* object) { return PyArray_IS_C_CONTIGUOUS(as_array(object)); }

// The value of step t and row b of an array of one each, which another thread may write to meanwhile.
template <class Value>
Value value_at(const Stream& stream, PyObject* object, Size t, Size b) {
  const char* const data = PyArray_BYTES(as_array(object));
  return *reinterpret_cast<const volatile Value*>(data + t * step_stride(stream, object) +
                                                  b * row_stride(stream, object));
}

// Copies tokens and flags [T, B], and tells of the latter where any is set. False: a token is out of range, and there
// is a Python exception.
bool take_block(Stream& stream, const Given& given, Size steps, const std::uint8_t*& resets) {
  const auto count = static_cast<std::size_t>(steps * stream.batch);
  if (stream.takes_tokens && stream.tokens.size() < count) stream.tokens.resize(count);
  if (given.resets && stream.resets.size() < count) stream.resets.resize(count);
  std::size_t place = 0;
  for (Size t = 0; t < steps && (stream.takes_tokens || given.resets); ++t)
    for (Size b = 0; b < stream.batch; ++b, ++place) {
      if (given.resets) {
        stream.resets[place] = value_at<npy_bool>(stream, given.resets, t, b) != 0;
        if (stream.resets[place]) resets = stream.resets.data();
      }
      if (!stream.takes_tokens) continue;
      stream.tokens[place] = value_at<std::int64_t>(stream, given.x, t, b);
      if (!is_known(stream, stream.tokens[place])) return false;
    }
  return true;
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_block(Stream& stream, const Given& given) {
  const StreamTurn turn(stream);
  if (!turn) {
    PyErr_SetString(PyExc_RuntimeError, turn.refused());
    return nullptr;
  }
  const Size steps = steps_of(stream, given.x), item = PyArray_ITEMSIZE(as_array(given.out));
  const bool is_done = without_exceptions([&] {
    const std::uint8_t* resets = nullptr;
    if (!take_block(stream, given, steps, resets)) throw py::error_already_set();
    const auto rows_of_array = [&](PyObject* object) {
      return Rows<void*>{PyArray_DATA(as_array(object)), step_stride(stream, object) / item,
                         row_stride(stream, object) / item};
    };
    NetworkInput input{{}, stream.takes_tokens ? stream.tokens.data() : nullptr};
    if (!stream.takes_tokens) {
      const Rows<void*> rows = rows_of_array(given.x);
      input.rows = {rows.data, rows.step, rows.row};
    }
    const Rows<void*> output = rows_of_array(given.out);
    without_gil(stream.operations_of_run(steps),
                [&](Interrupt* interrupt) { stream.run_steps(input, output, steps, resets, interrupt); });
  });
  stream.forget_long_block();
  return is_done ? Py_NewRef(given.out) : nullptr;
}

constexpr Method run_method{"stream",
                            "run: expected run(x), run(x, out) or run(x, out, resets=flags)",
                            "_prepare_run",
                            {"x", "out", "resets"},
                            2,
                            1};

PyObject* run(PyObject* self, PyObject* const* given, Py_ssize_t count, PyObject* names) {
  return call_method<Stream>(
      run_method, self, given, count, names,
      [](const Stream& stream, const Arguments& arguments, bool at_once) {
        const Given block = given_in(arguments);
        // With strides, whether x and out overlap is for Python to say.
        return fits_block(stream, block) &&
               (!at_once || (is_contiguous(block.x) && is_contiguous(block.out) && !overlap(block.x, block.out)));
      },
      [](Stream& stream, const Arguments& arguments) { return run_block(stream, given_in(arguments)); });
}

// ---- the rest ---------------------------------------------------------------------------------------------------

// The rows that are flagged in a bool array [] or [B].
void reset(Stream& stream, const py::array& rows) {
  const npy_bool* flags = flags_of(stream, rows.ptr());
  if (!flags) throw py::value_error("internal: flags of the wrong dtype or size");
  const bool all_rows = std::all_of(flags, flags + stream.batch, [](npy_bool flag) { return flag; });
  const StreamTurn turn(stream, all_rows);
  turn.require();
  stream.reset(flags);
}

void get_state(Stream& stream, const std::vector<py::array>& parts) {
  const StreamTurn turn(stream);
  turn.require();
  stream.state.copy_out(parts);
}

void set_state(Stream& stream, const std::vector<py::array>& parts) {
  stream.state.check(parts);
  const StreamTurn turn(stream, true);
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
    The outputs in the order of x's axes; `out` if it was given.)"}};

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
            const StreamTurn turn(stream);
            turn.require();
            if (!present(network)->is_like(*stream.network) || !head != !stream.head ||
                (head && !head->is_like(*stream.head)))
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
  for (PyMethodDef& method : methods)
    type.attr(method.ml_name) =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &method));
}

}  // namespace gatewise
