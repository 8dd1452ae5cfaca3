// Pools: many states with one set of weights, of which any number advance in one call. step(x, slots, out) is a C
// method as a stream's is.
#include <cstring>

#include "method.hpp"

namespace gatewise {
namespace {

struct Pool {
  std::shared_ptr<const Packed> packed;
  const int type_number;
  const Size item, input, output;
  const Size hidden_bytes, cell_bytes;  // of a slot, in each layer
  Size capacity = 0;
  Buffer hidden, cell;          // [capacity, L, R], [capacity, L, H]
  Buffer row_hidden, row_cell;  // [L, n, R], [L, n, H] of the n rows of a step
  Buffer scratch;               // of a step
  std::vector<std::uint8_t> is_open;
  std::vector<std::uint64_t> named;  // in which step each slot was last named
  std::vector<std::int64_t> slots;   // of a step
  std::uint64_t steps = 0;
  std::atomic<bool> busy{false};

  Pool(std::shared_ptr<const Packed> weights, Size first_capacity)
      : packed(std::move(weights)),
        type_number(packed->type_number()),
        item(packed->kernels->item_bytes),
        input(packed->input),
        output(packed->output()),
        hidden_bytes(packed->recurrent() * item),
        cell_bytes(packed->has_cell() ? packed->hidden * item : 0) {
    grow(first_capacity);
  }

  Size layers() const { return packed->layers; }

  // Makes room for so many slots in all; those that there are keep their states.
  void grow(Size wanted) {
    const auto grown = [&](const Buffer& old, Size bytes) {
      Buffer larger(static_cast<std::size_t>(wanted * layers() * bytes));
      if (capacity) std::memcpy(larger.data(), old.data(), static_cast<std::size_t>(capacity * layers() * bytes));
      return larger;
    };
    Buffer new_hidden = grown(hidden, hidden_bytes), new_cell = grown(cell, cell_bytes);
    Buffer new_row_hidden(static_cast<std::size_t>(wanted * layers() * hidden_bytes));
    Buffer new_row_cell(static_cast<std::size_t>(wanted * layers() * cell_bytes));
    Buffer new_scratch(static_cast<std::size_t>(scratch_bytes(call_of(wanted))));
    is_open.resize(static_cast<std::size_t>(wanted));
    named.resize(static_cast<std::size_t>(wanted));
    slots.resize(static_cast<std::size_t>(wanted));
    std::swap(hidden, new_hidden), std::swap(cell, new_cell), std::swap(scratch, new_scratch);
    std::swap(row_hidden, new_row_hidden), std::swap(row_cell, new_row_cell);
    capacity = wanted;
  }

  bool has(Size slot) const { return slot >= 0 && slot < capacity && is_open[static_cast<std::size_t>(slot)]; }
  char* hidden_of(Size slot) const { return static_cast<char*>(hidden.data()) + slot * layers() * hidden_bytes; }
  char* cell_of(Size slot) const { return static_cast<char*>(cell.data()) + slot * layers() * cell_bytes; }

  void clear(Size slot) {
    std::memset(hidden_of(slot), 0, static_cast<std::size_t>(layers() * hidden_bytes));
    std::memset(cell_of(slot), 0, static_cast<std::size_t>(layers() * cell_bytes));
  }

  // One step of n rows, complete but for its memory.
  Forward call_of(Size rows) const {
    Forward call{};
    call.stack = packed->stack();
    call.steps = 1;
    call.batch = rows;
    call.input = {nullptr, 0, input};
    call.output = {nullptr, 0, output};
    call.threads = packed->threads(1, rows);
    return call;
  }
  Size scratch_bytes(const Forward& call) const { return packed->kernels->forward_scratch(call) * item; }

  // Between the states of some slots and rows [L, n, .]; `copy` is given the row's place and the slot's.
  template <class Copy>
  void each_row(const Buffer& rows, const Buffer& states, Size bytes, Size count, const Copy& copy) const {
    auto* row = static_cast<char*>(rows.data());
    for (Size layer = 0; layer < layers() && bytes; ++layer)
      for (Size i = 0; i < count; ++i, row += bytes)
        copy(row, static_cast<char*>(states.data()) + (slots[static_cast<std::size_t>(i)] * layers() + layer) * bytes,
             static_cast<std::size_t>(bytes));
  }

  // Of the first `count` of `slots`, which are open and each named once.
  void step(const void* x, Size count, void* out) {
    Forward call = call_of(count);
    // Allocated before, unless the number of threads has changed since.
    if (static_cast<std::size_t>(scratch_bytes(call)) > scratch.bytes())
      scratch = Buffer(static_cast<std::size_t>(scratch_bytes(call)));
    const auto bring = [](char* row, const char* state, std::size_t bytes) { std::memcpy(row, state, bytes); };
    const auto take_back = [](const char* row, char* state, std::size_t bytes) { std::memcpy(state, row, bytes); };
    each_row(row_hidden, hidden, hidden_bytes, count, bring);
    each_row(row_cell, cell, cell_bytes, count, bring);
    call.input.data = x;
    call.output.data = out;
    call.hidden_before = call.hidden_after = row_hidden.data();
    call.cell_before = call.cell_after = cell_bytes ? row_cell.data() : nullptr;
    call.scratch = scratch.data();
    packed->kernels->forward(call);
    each_row(row_hidden, hidden, hidden_bytes, count, take_back);
    each_row(row_cell, cell, cell_bytes, count, take_back);
  }
};

struct PoolTurn : Turn {
  explicit PoolTurn(Pool& pool) : Turn(pool.busy, "this pool is in use by another thread") {}
};

// ---- step -------------------------------------------------------------------------------------------------------

struct Step {
  PyObject *x = nullptr, *slots = nullptr, *out = nullptr;
};

// Whether `object` is an array of this type and shape that can be used as it is; columns 0: one axis.
bool fits(PyObject* object, int type_number, Size rows, Size columns, bool writeable) {
  if (!PyArray_Check(object)) return false;
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  return PyArray_TYPE(array) == type_number && PyArray_ISCARRAY_RO(array) &&
         (!writeable || PyArray_ISWRITEABLE(array)) && PyArray_NDIM(array) == (columns ? 2 : 1) &&
         PyArray_DIM(array, 0) == rows && (!columns || PyArray_DIM(array, 1) == columns);
}

bool fits(const Pool& pool, const Step& given) {
  if (!given.out || !PyArray_Check(given.slots)) return false;
  auto* slots = reinterpret_cast<PyArrayObject*>(given.slots);
  if (PyArray_NDIM(slots) != 1) return false;
  const Size rows = PyArray_DIM(slots, 0);
  return fits(given.slots, NPY_INT64, rows, 0, false) && fits(given.x, pool.type_number, rows, pool.input, false) &&
         fits(given.out, pool.type_number, rows, pool.output, true) && !overlap(given.x, given.out) &&
         !overlap(given.slots, given.out);
}

// Whether each is open and named once; else a Python exception. They are copied, since another thread may write to the
// array meanwhile.
bool take_slots(Pool& pool, const std::int64_t* slots, Size count) {
  ++pool.steps;
  for (Size i = 0; i < count; ++i) {
    const std::int64_t number = *static_cast<const volatile std::int64_t*>(slots + i);
    const auto slot = static_cast<std::size_t>(number);
    const bool known = number >= 0 && number < pool.capacity;
    if (known && pool.is_open[slot] && std::exchange(pool.named[slot], pool.steps) != pool.steps) {
      pool.slots[static_cast<std::size_t>(i)] = number;  // no more than there are, since each is another one
      continue;
    }
    PyErr_Format(PyExc_ValueError, "slots: expected open slots, each once, got %lld, which is %s",
                 static_cast<long long>(number),
                 !known               ? "unknown"
                 : pool.is_open[slot] ? "named twice"
                                      : "closed");
    return false;
  }
  return true;
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_step(Pool& pool, const Step& given) {
  const PoolTurn turn(pool);
  if (!turn) {
    PyErr_SetString(PyExc_RuntimeError, turn.refused());
    return nullptr;
  }
  auto* array = reinterpret_cast<PyArrayObject*>(given.slots);
  const auto* slots = static_cast<const std::int64_t*>(PyArray_DATA(array));
  const Size count = PyArray_DIM(array, 0);
  if (!take_slots(pool, slots, count)) return nullptr;
  try {
    without_gil(pool.packed->operations(count), [&] {
      pool.step(PyArray_DATA(reinterpret_cast<PyArrayObject*>(given.x)), count,
                PyArray_DATA(reinterpret_cast<PyArrayObject*>(given.out)));
    });
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  return Py_NewRef(given.out);
}

PyObject* step(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  Pool* pool = object_in<Pool>(self);
  if (!pool) {
    PyErr_SetString(PyExc_TypeError, "pool: not initialised");
    return nullptr;
  }
  Step given;
  PyObject** const places[] = {&given.x, &given.slots, &given.out};
  bool understood = count <= 3;
  for (Py_ssize_t i = 0; i < count && understood; ++i) *places[i] = arguments[i];
  for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); ++i) {
    const auto named = [&](const char* name) {
      return PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), name) == 0;
    };
    PyObject** place = named("x") ? &given.x : named("slots") ? &given.slots : named("out") ? &given.out : nullptr;
    if (place && !*place)
      *place = arguments[count + i];
    else
      understood = false;
  }
  if (!understood || !given.x || !given.slots) {
    PyErr_SetString(PyExc_TypeError, "step: expected step(x, slots) or step(x, slots, out)");
    return nullptr;
  }
  if (fits(*pool, given)) return run_step(*pool, given);
  // Anything else Python converts, or says what is wrong.
  const auto prepared = py::reinterpret_steal<py::object>(
      PyObject_CallMethod(self, "_prepare_step", "OOO", given.x, given.slots, given.out ? given.out : Py_None));
  if (!prepared) return nullptr;
  Step fitting;
  if (PyTuple_Check(prepared.ptr()) && PyTuple_GET_SIZE(prepared.ptr()) == 3)
    fitting = {PyTuple_GET_ITEM(prepared.ptr(), 0), PyTuple_GET_ITEM(prepared.ptr(), 1),
               PyTuple_GET_ITEM(prepared.ptr(), 2)};
  if (!fitting.x || !fits(*pool, fitting)) {
    PyErr_SetString(PyExc_ValueError, "internal: prepared arrays do not fit");
    return nullptr;
  }
  return run_step(*pool, fitting);
}

// ---- the rest ---------------------------------------------------------------------------------------------------

// An open slot with a state of zero, or -1 where all are open.
Size open(Pool& pool) {
  const PoolTurn turn(pool);
  turn.require();
  for (Size slot = 0; slot < pool.capacity; ++slot)
    if (!pool.is_open[static_cast<std::size_t>(slot)]) {
      pool.is_open[static_cast<std::size_t>(slot)] = 1;
      pool.clear(slot);
      return slot;
    }
  return -1;
}

void require_open(const Pool& pool, Size slot) {
  if (!pool.has(slot))
    throw py::value_error("slot: expected an open slot, got " + std::to_string(slot) + ", which is " +
                          (slot >= 0 && slot < pool.capacity ? "closed" : "unknown"));
}

void close(Pool& pool, Size slot) {
  const PoolTurn turn(pool);
  turn.require();
  require_open(pool, slot);
  pool.is_open[static_cast<std::size_t>(slot)] = 0;
}

void reset(Pool& pool, const std::vector<Size>& slots) {
  const PoolTurn turn(pool);
  turn.require();
  for (const Size slot : slots) require_open(pool, slot);
  for (const Size slot : slots) pool.clear(slot);
}

void check_state(const Pool& pool, const py::array& hidden, const Array& cell) {
  if (hidden.nbytes() != pool.layers() * pool.hidden_bytes || !(hidden.flags() & py::array::c_style) ||
      cell.has_value() != (pool.cell_bytes > 0) ||
      (cell && (cell->nbytes() != pool.layers() * pool.cell_bytes || !(cell->flags() & py::array::c_style))))
    throw py::value_error("internal: a state of the wrong size");
}

// hidden [L, R], cell [L, H] or None.
void get_state(Pool& pool, Size slot, py::array& hidden, std::optional<py::array>& cell) {
  check_state(pool, hidden, cell);
  const PoolTurn turn(pool);
  turn.require();
  require_open(pool, slot);
  std::memcpy(hidden.mutable_data(), pool.hidden_of(slot), static_cast<std::size_t>(hidden.nbytes()));
  if (cell) std::memcpy(cell->mutable_data(), pool.cell_of(slot), static_cast<std::size_t>(cell->nbytes()));
}

void set_state(Pool& pool, Size slot, const py::array& hidden, const Array& cell) {
  check_state(pool, hidden, cell);
  const PoolTurn turn(pool);
  turn.require();
  require_open(pool, slot);
  std::memcpy(pool.hidden_of(slot), hidden.data(), static_cast<std::size_t>(hidden.nbytes()));
  if (cell) std::memcpy(pool.cell_of(slot), cell->data(), static_cast<std::size_t>(cell->nbytes()));
}

PyMethodDef step_definition = {
    "step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)), METH_FASTCALL | METH_KEYWORDS,
    "step($self, x, slots, out=None)\n--\n\n"
    "One step of some slots in one call. x (n, I), slots (n,), out (n, H). The others stay as they are.\nWith `out`, "
    "and "
    "slots of int64, nothing is converted and nothing allocated; without it x is converted and\na new array returned."};

}  // namespace

void bind_pools(py::module_& module) {
  using namespace py::literals;
  py::class_<Pool> type(module, "Pool");
  type.def(py::init<std::shared_ptr<const Packed>, Size>(), "packed"_a, "capacity"_a)
      .def("_open", open)
      .def("_close", close, "slot"_a)
      .def("_reset", reset, "slots"_a)
      .def("_get_state", get_state, "slot"_a, "hidden"_a, "cell"_a)
      .def("_set_state", set_state, "slot"_a, "hidden"_a, "cell"_a)
      .def(
          "_grow",
          [](Pool& pool, Size more, Size most) {
            const PoolTurn turn(pool);
            turn.require();
            if (more > most - pool.capacity)
              throw py::value_error("more: expected at most " + std::to_string(most - pool.capacity) +
                                    " slots more, got " + std::to_string(more));
            pool.grow(pool.capacity + more);
          },
          "more"_a, "most"_a)
      .def_readonly("capacity", &Pool::capacity)
      .def(
          "_use",
          [](Pool& pool, std::shared_ptr<const Packed> packed) {
            const PoolTurn turn(pool);
            turn.require();
            if (packed->input != pool.input || packed->output() != pool.output || packed->layers != pool.layers() ||
                packed->hidden != pool.packed->hidden || packed->type_number() != pool.type_number ||
                packed->layer[0].cell != pool.packed->layer[0].cell)
              throw py::value_error("internal: weights of other sizes");
            pool.packed = std::move(packed);
          },
          "packed"_a)
      .def_property_readonly("_open_slots", [](Pool& pool) {
        const PoolTurn turn(pool);
        turn.require();
        std::vector<Size> slots;
        for (Size slot = 0; slot < pool.capacity; ++slot)
          if (pool.has(slot)) slots.push_back(slot);
        return slots;
      });
  type.attr("step") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &step_definition));
}

}  // namespace gatewise
