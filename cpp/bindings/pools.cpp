// Pools: many states that share one set of weights; a call advances any number of them. step(x, slots, out) is a C
// method, as that of a stream.
#include <algorithm>
#include <cstring>

#include "interruption.hpp"
#include "method.hpp"
#include "networks.hpp"

namespace gatewise {
namespace {

struct Pool {
  std::shared_ptr<const HeldNetwork> network;
  const int type_number;
  const bool takes_tokens;
  const Size item, input, output;
  Size slot_bytes = 0;  // of the state in a slot
  Size capacity = 0;
  Buffer states;   // [capacity] slots, each with all parts [count, units]
  Buffer rows;     // of the n slots of a step, part by part: [count, n, units]
  Buffer scratch;  // of a step
  std::unique_ptr<Run> run;
  std::vector<void*> parts;  // where each begins in `rows`
  std::vector<std::uint8_t> is_open;
  std::vector<std::uint64_t> named;  // the step in which each slot was last named
  std::vector<std::int64_t> slots;   // of a step
  std::vector<std::int64_t> tokens;  // of a step
  std::uint64_t steps = 0;
  Occupancy occupancy;

  Pool(std::shared_ptr<const HeldNetwork> shared_network, Size first_capacity)
      : network(present(shared_network)),
        type_number(network->type_number()),
        takes_tokens(network->takes_tokens()),
        item(network->item()),
        input(network->input()),
        output(network->output()),
        run(std::make_unique<Run>()),
        parts(network->state_parts.size()) {
    require(first_capacity > 0, "internal: a pool of nothing");
    for (const StatePart& part : network->state_parts) slot_bytes += part.count * part.units * item;
    grow(first_capacity);
  }

  // Makes room for this many slots in all. The present ones keep their states.
  void grow(Size new_capacity) {
    if (new_capacity > (Size(1) << 46) / std::max<Size>(1, slot_bytes)) throw std::bad_alloc();
    Buffer new_states(static_cast<std::size_t>(new_capacity * slot_bytes));
    if (capacity) std::memcpy(new_states.data(), states.data(), static_cast<std::size_t>(capacity * slot_bytes));
    Buffer new_rows(static_cast<std::size_t>(new_capacity * slot_bytes + 64 * static_cast<Size>(parts.size())));
    run->lay_out(*network, 1, new_capacity, {}, 0);
    Buffer new_scratch(static_cast<std::size_t>(run->bytes()));
    is_open.resize(static_cast<std::size_t>(new_capacity));
    named.resize(static_cast<std::size_t>(new_capacity));
    slots.resize(static_cast<std::size_t>(new_capacity));
    if (takes_tokens) tokens.resize(static_cast<std::size_t>(new_capacity));
    std::swap(states, new_states);
    std::swap(rows, new_rows);
    std::swap(scratch, new_scratch);
    capacity = new_capacity;
  }

  // Whether an open slot was named in the last step.
  bool was_in_step(Size slot) const { return has(slot) && named[static_cast<std::size_t>(slot)] == steps; }

  // Makes the pool usable again after a fork in the middle of a step. Nothing that the step may have been changing is
  // trusted, or even freed.
  void renew() {
    auto new_run = std::make_unique<Run>();
    auto* const old_scratch = new Buffer;
    // Nothing below can fail.
    static_cast<void>(run.release());
    std::swap(*old_scratch, scratch);
    run = std::move(new_run);
  }

  bool has(Size slot) const { return slot >= 0 && slot < capacity && is_open[static_cast<std::size_t>(slot)]; }
  char* state_of(Size slot) const { return static_cast<char*>(states.data()) + slot * slot_bytes; }
  void clear(Size slot) { std::memset(state_of(slot), 0, static_cast<std::size_t>(slot_bytes)); }

  // The bytes of each part of a slot's state, which follow one another.
  std::vector<Size> part_bytes() const {
    std::vector<Size> bytes;
    for (const StatePart& part : network->state_parts) bytes.push_back(part.count * part.units * item);
    return bytes;
  }

  // Calls copy(row, state, bytes) for each piece of the states of the first `count` of `slots`: its place in `rows`,
  // and in the state of its slot.
  template <class Copy>
  void each_row(Size count, const Copy& copy) const {
    Size offset = 0;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const StatePart& part = network->state_parts[i];
      const Size bytes = part.units * item;
      char* row = static_cast<char*>(parts[i]);
      for (Size n = 0; n < part.count; ++n, offset += bytes)
        for (Size slot = 0; slot < count; ++slot, row += bytes)
          copy(row, state_of(slots[static_cast<std::size_t>(slot)]) + offset, static_cast<std::size_t>(bytes));
    }
  }

  // Advances the first `count` of `slots`, which are open and each named once. If interrupted, their states stay as
  // they were before.
  void step(const void* x, Size count, void* out, Interrupt* interrupt) {
    run->lay_out(*network, 1, count, {}, 0);
    // There is enough scratch, unless the number of threads has changed since it was allocated.
    if (static_cast<std::size_t>(run->bytes()) > scratch.bytes())
      scratch = Buffer(static_cast<std::size_t>(run->bytes()));
    char* next = static_cast<char*>(rows.data());
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const StatePart& part = network->state_parts[i];
      parts[i] = next;
      next += lines(part.count * count * part.units * item);
    }
    run->place(scratch.data(), parts.data(), parts.data());
    each_row(count, [](char* row, const char* state, std::size_t bytes) { std::memcpy(row, state, bytes); });
    if ((*run)({{x, 0, input}, tokens.data()}, {out, 0, output}, interrupt) == Status::interrupted) return;
    each_row(count, [](const char* row, char* state, std::size_t bytes) { std::memcpy(state, row, bytes); });
  }
};

struct PoolUse : ExclusiveUse {
  explicit PoolUse(Pool& pool, bool takes_abandoned = false)
      : ExclusiveUse(
            pool.occupancy, "this pool is in use by another thread",
            "this pool was in use by another thread when the process forked; reset() the slots of its step first",
            takes_abandoned) {}
};

// ---- step -------------------------------------------------------------------------------------------------------

struct Operands {
  PyObject *x = nullptr, *slots = nullptr, *out = nullptr;
};
Operands operands_in(const Arguments& arguments) { return {arguments[0], arguments[1], arguments[2]}; }

// Whether `object` is an array of this type and shape that can be used as it is; columns 0: it has one axis only.
bool fits(PyObject* object, int type_number, Size rows, Size columns, bool writeable) {
  if (!PyArray_Check(object)) return false;
  auto* array = reinterpret_cast<PyArrayObject*>(object);
  return PyArray_TYPE(array) == type_number && PyArray_ISCARRAY_RO(array) &&
         (!writeable || PyArray_ISWRITEABLE(array)) && PyArray_NDIM(array) == (columns ? 2 : 1) &&
         PyArray_DIM(array, 0) == rows && (!columns || PyArray_DIM(array, 1) == columns);
}

bool fits(const Pool& pool, const Operands& operands) {
  if (!operands.out || !PyArray_Check(operands.slots)) return false;
  auto* slots = reinterpret_cast<PyArrayObject*>(operands.slots);
  if (PyArray_NDIM(slots) != 1) return false;
  const Size rows = PyArray_DIM(slots, 0);
  return fits(operands.slots, NPY_INT64, rows, 0, false) &&
         (pool.takes_tokens ? fits(operands.x, NPY_INT64, rows, 0, false)
                            : fits(operands.x, pool.type_number, rows, pool.input, false)) &&
         fits(operands.out, pool.type_number, rows, pool.output, true) && !overlap(operands.x, operands.out) &&
         !overlap(operands.slots, operands.out);
}

// Copies the slots, since another thread may write to the array meanwhile. Returns false, with a Python exception, if
// one is not open or is named twice.
bool take_slots(Pool& pool, const std::int64_t* slots, Size count) {
  ++pool.steps;
  for (Size i = 0; i < count; ++i) {
    const std::int64_t number = *static_cast<const volatile std::int64_t*>(slots + i);
    const auto slot = static_cast<std::size_t>(number);
    const bool known = number >= 0 && number < pool.capacity;
    if (known && pool.is_open[slot] && std::exchange(pool.named[slot], pool.steps) != pool.steps) {
      pool.slots[static_cast<std::size_t>(i)] = number;  // there is room, since no slot comes twice
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

// Copies the tokens. Returns false, with a Python exception, if the table does not have one of them.
bool take_tokens(Pool& pool, const std::int64_t* tokens, Size count) {
  for (Size i = 0; i < count; ++i) {
    const std::int64_t token = static_cast<const volatile std::int64_t*>(tokens)[i];
    if (token < 0 || token >= pool.input) {
      refuse_token(pool.input, token);
      return false;
    }
    pool.tokens[static_cast<std::size_t>(i)] = token;
  }
  return true;
}

// A new reference to `out`, or null and a Python exception.
PyObject* run_step(Pool& pool, const Operands& operands) {
  const PoolUse use(pool);
  if (!use) {
    PyErr_SetString(PyExc_RuntimeError, use.refusal());
    return nullptr;
  }
  auto* array = reinterpret_cast<PyArrayObject*>(operands.slots);
  const auto* slots = static_cast<const std::int64_t*>(PyArray_DATA(array));
  const Size count = PyArray_DIM(array, 0);
  if (!take_slots(pool, slots, count)) return nullptr;
  const void* x = PyArray_DATA(reinterpret_cast<PyArrayObject*>(operands.x));
  void* out = PyArray_DATA(reinterpret_cast<PyArrayObject*>(operands.out));
  if (pool.takes_tokens && !take_tokens(pool, static_cast<const std::int64_t*>(x), count)) return nullptr;
  if (count == 0) return Py_NewRef(operands.out);
  const bool is_done = without_exceptions([&] {
    without_gil(pool.network->operations(count), [&](Interrupt* interrupt) { pool.step(x, count, out, interrupt); });
  });
  return is_done ? Py_NewRef(operands.out) : nullptr;
}

constexpr Method step_method{
    "pool", "step: expected step(x, slots) or step(x, slots, out)", "_prepare_step", {"x", "slots", "out"}, 3, 2};

PyObject* step(PyObject* self, PyObject* const* values, Py_ssize_t count, PyObject* names) {
  return call_method<Pool>(
      step_method, self, values, count, names,
      [](const Pool& pool, const Arguments& arguments, bool) { return fits(pool, operands_in(arguments)); },
      [](Pool& pool, const Arguments& arguments) { return run_step(pool, operands_in(arguments)); });
}

// ---- slots and states --------------------------------------------------------------------------------------------

// Opens a slot, whose state is zero, and returns it; -1 if all slots are open.
Size open(Pool& pool) {
  const PoolUse use(pool);
  use.require();
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
  const PoolUse use(pool);
  use.require();
  require_open(pool, slot);
  pool.is_open[static_cast<std::size_t>(slot)] = 0;
}

// Whether `slots` are open, and all slots of the last step are among them.
bool has_last_step(const Pool& pool, const std::vector<Size>& slots) {
  std::vector<bool> is_listed(static_cast<std::size_t>(pool.capacity));
  for (const Size slot : slots) {
    if (!pool.has(slot)) return false;
    is_listed[static_cast<std::size_t>(slot)] = true;
  }
  for (Size slot = 0; slot < pool.capacity; ++slot)
    if (pool.was_in_step(slot) && !is_listed[static_cast<std::size_t>(slot)]) return false;
  return true;
}

// Resets open slots. After a fork during a step, they must include all slots of that step, whose states may be half
// written.
void reset(Pool& pool, const std::vector<Size>& slots) {
  PoolUse use(pool, pool.occupancy.is_abandoned() && has_last_step(pool, slots));
  use.require();
  for (const Size slot : slots) require_open(pool, slot);
  if (use.was_abandoned()) {
    try {
      pool.renew();
    } catch (...) {
      use.abandon();
      throw;
    }
  }
  for (const Size slot : slots) pool.clear(slot);
}

// Copy the state of a slot into one array for each of its parts, or from these.
void get_state(Pool& pool, Size slot, const std::vector<py::array>& parts) {
  check_parts(parts, pool.part_bytes());
  const PoolUse use(pool);
  use.require();
  require_open(pool, slot);
  const char* from = pool.state_of(slot);
  for (py::array part : parts) {
    std::memcpy(part.mutable_data(), from, static_cast<std::size_t>(part.nbytes()));
    from += part.nbytes();
  }
}

void set_state(Pool& pool, Size slot, const std::vector<py::array>& parts) {
  check_parts(parts, pool.part_bytes());
  const PoolUse use(pool);
  use.require();
  require_open(pool, slot);
  char* to = pool.state_of(slot);
  for (const py::array& part : parts) {
    std::memcpy(to, part.data(), static_cast<std::size_t>(part.nbytes()));
    to += part.nbytes();
  }
}

PyMethodDef step_definition = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(step)),
                               METH_FASTCALL | METH_KEYWORDS,
                               R"(step($self, x, slots, out=None)
--

One step of some slots in one call. x (n, I), tokens (n,), slots (n,), out (n, O). Other slots stay as they are.
With `out`, and slots of int64, nothing is converted and nothing allocated; without it x is converted and a new array
returned.)"};

}  // namespace

void bind_pools(py::module_& module) {
  using namespace py::literals;
  py::class_<Pool> type(module, "Pool");
  type.def(py::init<std::shared_ptr<const HeldNetwork>, Size>(), "network"_a, "capacity"_a)
      .def("_open", open)
      .def("_close", close, "slot"_a)
      .def("_reset", reset, "slots"_a)
      .def("_get_state", get_state, "slot"_a, "parts"_a)
      .def("_set_state", set_state, "slot"_a, "parts"_a)
      .def(
          "_grow",
          [](Pool& pool, Size more, Size most) {
            const PoolUse use(pool);
            use.require();
            if (more > most - pool.capacity)
              throw py::value_error("more: expected at most " + std::to_string(most - pool.capacity) +
                                    " slots more, got " + std::to_string(more));
            pool.grow(pool.capacity + more);
          },
          "more"_a, "most"_a)
      .def_readonly("capacity", &Pool::capacity)
      .def(
          "_use",
          [](Pool& pool, std::shared_ptr<const HeldNetwork> network) {
            const PoolUse use(pool);
            use.require();
            if (!present(network)->is_like(*pool.network)) throw py::value_error("internal: a network of other sizes");
            pool.network = std::move(network);
          },
          "network"_a)
      .def_property_readonly("_open_slots", [](Pool& pool) {
        const PoolUse use(pool);
        use.require();
        std::vector<Size> slots;
        for (Size slot = 0; slot < pool.capacity; ++slot)
          if (pool.has(slot)) slots.push_back(slot);
        return slots;
      });
  type.attr("step") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &step_definition));
}

}  // namespace gatewise
