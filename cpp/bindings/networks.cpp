// Whole networks: their nodes, their state, and their call over a whole sequence.
#include "networks.hpp"

#include <algorithm>
#include <cstring>

#include "interruption.hpp"
#include "packed.hpp"

namespace gatewise {
namespace {

Size bytes_of_type(const Kernels& kernels, Size elements) { return elements * kernels.item_bytes; }

// ---- nodes ------------------------------------------------------------------------------------------------------

// The weights of a function of rows, packed for one backend.
struct RowWeights {
  const Kernels* kernels;
  RowFunction function;
  Buffer memory;
};

// weights: in the order of Kernels::pack_rows, or None in place of missing ones.
std::shared_ptr<RowWeights> row_weights_of(const std::string& operation, const py::dtype& dtype, Size input,
                                           Size output, const NamedFunction& activation, double epsilon,
                                           const std::vector<Array>& weights) {
  const Kernels& kernels = kernels_for(dtype);
  RowFunction function{operation_of(operation), input, output, function_of(activation), epsilon, nullptr};
  const Operation kind = function.operation;
  const bool joins_halves = kind == Operation::add || kind == Operation::multiply || kind == Operation::average;
  require(input > 0 && output > 0 && (kind == Operation::dense || input == (joins_halves ? 2 * output : output)),
          "internal: sizes do not fit");
  const std::size_t count = kind == Operation::dense        ? 2
                            : kind == Operation::normalize  ? 3
                            : kind == Operation::layer_norm ? 2
                                                            : 0;
  require(weights.size() == count, "internal: another number of weights");
  std::vector<const void*> pointers;
  for (std::size_t i = 0; i < count; ++i) {
    const bool needed = kind == Operation::normalize || (kind == Operation::dense && i == 0);
    require(weights[i].has_value() || !needed, "internal: a missing weight");
    if (!weights[i]) {
      pointers.push_back(nullptr);
      continue;
    }
    auto* raw = reinterpret_cast<PyArrayObject*>(weights[i]->ptr());
    require(PyArray_TYPE(raw) == dtype.num() && PyArray_ISCARRAY_RO(raw) &&
                PyArray_SIZE(raw) == (kind == Operation::dense && i == 0 ? input * output : output),
            "internal: a weight of the wrong dtype, size or layout");
    pointers.push_back(PyArray_DATA(raw));
  }
  auto packed = std::make_shared<RowWeights>(RowWeights{&kernels, function, Buffer()});
  packed->memory = Buffer(static_cast<std::size_t>(bytes_of_type(kernels, kernels.rows_packed_size(packed->function))));
  kernels.pack_rows(packed->function, pointers.data(), packed->memory.data());
  packed->function.packed = packed->memory.data();
  return packed;
}

// What an embedding looks up. The array stays where Python has it.
struct Table {
  py::array array;  // [V, E]
  Size rows, units;
  const char* backend;  // that was active when the table was made, as for other weights
};

std::shared_ptr<Table> table_of(const py::array& array) {
  auto* raw = reinterpret_cast<PyArrayObject*>(array.ptr());
  require(PyArray_NDIM(raw) == 2 && PyArray_ISCARRAY_RO(raw) && PyArray_DIM(raw, 0) > 0 && PyArray_DIM(raw, 1) > 0 &&
              (PyArray_TYPE(raw) == NPY_FLOAT || PyArray_TYPE(raw) == NPY_DOUBLE),
          "internal: a table of the wrong dtype, shape or layout");
  return std::make_shared<Table>(Table{array, PyArray_DIM(raw, 0), PyArray_DIM(raw, 1), active_backend().name});
}

// The products of a table's rows with the input weights of the layer after it.
struct Sums {
  std::shared_ptr<const Packed> packed;
  Size rows;
  Buffer memory[2];
};

std::shared_ptr<Sums> sums_of(const std::shared_ptr<const Packed>& packed, const Table& table) {
  require(table.units == present(packed)->input && table.array.dtype().num() == packed->type_number(),
          "internal: a table of other units");
  auto sums = std::make_shared<Sums>();
  sums->packed = packed;
  sums->rows = table.rows;
  const Kernels& kernels = *packed->kernels;
  for (Size d = 0; d < packed->directions; ++d)
    sums->memory[d] = Buffer(static_cast<std::size_t>(
        bytes_of_type(kernels, table.rows * kernels.input_sums_size(packed->layer[static_cast<std::size_t>(d)]))));
  const auto* rows = static_cast<const char*>(table.array.data());
  const Size rows_at_a_time = std::max<Size>(1, 16 * look_operations / packed->operations(1));
  without_gil(packed->operations(table.rows), [&](Interrupt* interrupt) {
    for (Size d = 0; d < packed->directions; ++d) {
      const Layer& layer = packed->layer[static_cast<std::size_t>(d)];
      const Size row_bytes = bytes_of_type(kernels, table.units),
                 sums_bytes = bytes_of_type(kernels, kernels.input_sums_size(layer));
      for (Size first = 0; first < table.rows && !look_whether_asked(interrupt); first += rows_at_a_time)
        kernels.input_sums(layer, std::min(rows_at_a_time, table.rows - first), rows + first * row_bytes, table.units,
                           static_cast<char*>(sums->memory[d].data()) + first * sums_bytes);
    }
  });
  return sums;
}

// ---- networks ---------------------------------------------------------------------------------------------------

Node::Kind kind_of(const std::string& name) {
  return name == "mask"          ? Node::Kind::mask
         : name == "lookup"      ? Node::Kind::lookup
         : name == "recurrent"   ? Node::Kind::recurrent
         : name == "rows"        ? Node::Kind::rows
         : name == "convolution" ? Node::Kind::convolution
         : name == "reverse"     ? Node::Kind::reverse
         : name == "last"        ? Node::Kind::last
                                 : throw py::value_error("internal: an unknown node");
}

// nodes: ("mask", units or tokens, value), ("lookup", Table), ("recurrent", Packed), ("rows", RowWeights),
// ("convolution", RowWeights, taps, dilation, left), ("reverse", units) or ("last", units, both_ends, in_time); sums:
// of the table and the layer after it.
std::shared_ptr<HeldNetwork> network_of(const py::dtype& dtype, const py::list& nodes,
                                        const std::shared_ptr<Sums>& sums) {
  auto network = std::make_shared<HeldNetwork>();
  network->kernels = nullptr;
  const auto use = [&](const Kernels* kernels) {
    require(!network->kernels || network->kernels == kernels, "internal: nodes of two backends");
    network->kernels = kernels;
  };
  for (const py::handle handle : nodes) {
    const auto fields = py::cast<py::tuple>(handle);
    Node node{};
    node.kind = kind_of(py::cast<std::string>(fields[0]));
    if (node.kind == Node::Kind::mask) {
      require(network->nodes.empty(), "internal: a mask that is not the first node");
      node.input = node.output = py::cast<Size>(fields[1]);
      node.masked = py::cast<double>(fields[2]);
    } else if (node.kind == Node::Kind::lookup) {
      const auto table = present(py::cast<std::shared_ptr<Table>>(fields[1]));
      require(network->nodes.empty() || (network->masks() && network->nodes.size() == 1),
              "internal: a table that is not the first node");
      node.input = table->rows;
      node.output = table->units;
      node.table = table->array.data();
      require(table->array.dtype().num() == dtype.num(), "internal: a table of another dtype");
      network->owners.push_back(table);
    } else if (node.kind == Node::Kind::recurrent) {
      const auto packed = present(py::cast<std::shared_ptr<Packed>>(fields[1]));
      node.input = packed->input;
      node.output = packed->output();
      node.stack = packed->stack();
      use(packed->kernels);
      network->owners.push_back(packed);
    } else if (node.kind == Node::Kind::reverse) {
      node.input = node.output = py::cast<Size>(fields[1]);
    } else if (node.kind == Node::Kind::last) {
      node.input = node.output = py::cast<Size>(fields[1]);
      node.both_ends = py::cast<bool>(fields[2]);
      node.in_time = py::cast<bool>(fields[3]);
      require(!node.both_ends || node.input % 2 == 0, "internal: two halves that differ");
    } else {
      const auto weights = present(py::cast<std::shared_ptr<RowWeights>>(fields[1]));
      node.function = weights->function;
      node.input = node.function.input;
      node.output = node.function.output;
      if (node.kind == Node::Kind::convolution) {
        node.taps = py::cast<Size>(fields[2]);
        node.dilation = py::cast<Size>(fields[3]);
        node.left = py::cast<Size>(fields[4]);
        require(node.function.operation == Operation::dense && node.taps > 0 && node.dilation > 0 && node.left >= 0 &&
                    node.left <= (node.taps - 1) * node.dilation && node.input % node.taps == 0,
                "internal: a convolution whose sizes do not fit");
        node.input /= node.taps;
      }
      use(weights->kernels);
      network->owners.push_back(weights);
    }
    require(network->nodes.empty() || network->nodes.back().output == node.input, "internal: units that do not fit");
    require(node.input > 0 && node.output > 0, "internal: a row of no units");
    network->nodes.push_back(node);
  }
  if (!network->kernels) network->kernels = &kernels_for(dtype);
  require(network->nodes.size() > std::size_t(!network->nodes.empty() && network->masks()) &&
              network->type_number() == dtype.num(),
          "internal: a network of no nodes, or of another dtype");
  bool time_has_ended = false;
  for (const Node& node : network->nodes) {
    require(!time_has_ended || node.kind == Node::Kind::rows, "internal: a node that needs time after the last step");
    time_has_ended = time_has_ended || node.kind == Node::Kind::last;
  }
  if (sums) {
    const std::size_t first = network->first();
    require(network->nodes.size() > first + 1 && network->nodes[first].kind == Node::Kind::lookup &&
                network->nodes[first + 1].kind == Node::Kind::recurrent &&
                network->nodes[first + 1].stack.layer == sums->packed->layer.data() &&
                sums->rows == network->nodes[first].input,
            "internal: sums of another table or layer");
    for (int d = 0; d < 2; ++d) network->sums[d] = sums->memory[d].data();
    network->owners.push_back(sums);
  }
  network->state_parts = network->parts();
  return network;
}

// x and output as for run_network; parts of the state before, None for zero, and after.
void forward(const HeldNetwork& network, const py::array& x, const std::vector<Array>& before, const py::array& output,
             const std::vector<Array>& after, const HeldSchedule* schedule) {
  const std::size_t parts = network.state_parts.size();
  require(x.ndim() >= 2 && before.size() == parts && after.size() == parts, "internal: another number of states");
  const Size batch = x.shape(1);
  std::vector<const void*> from;
  std::vector<void*> to;
  for (std::size_t i = 0; i < parts; ++i) {
    const Size size = network.state_parts[i].count * batch * network.state_parts[i].units;
    from.push_back(flat(*network.kernels, before[i], size, false));
    to.push_back(flat(*network.kernels, after[i], size, true));
    require(to.back(), "internal: no room for a state");
  }
  run_network(network, x, from, output, to, batch, schedule);
}

}  // namespace

Sequences sequences_of(const HeldNetwork& network, const py::array& x, Size units, const py::array& output) {
  require(x.ndim() >= 2 && output.ndim() == 3, "internal: a sequence without time or batch");
  Sequences sequences{x.shape(0), x.shape(1), {}, {}};
  if (network.takes_tokens()) {
    auto* raw = reinterpret_cast<PyArrayObject*>(x.ptr());
    require(PyArray_NDIM(raw) == 2 && PyArray_TYPE(raw) == NPY_INT64 && PyArray_ISCARRAY_RO(raw),
            "internal: tokens of the wrong dtype, shape or layout");
    sequences.input.tokens = static_cast<const std::int64_t*>(PyArray_DATA(raw));
    require(std::all_of(sequences.input.tokens, sequences.input.tokens + PyArray_SIZE(raw),
                        [&](std::int64_t token) { return token >= 0 && token < network.input(); }),
            "internal: a token that the table does not have");
  } else {
    const Rows<void*> rows = rows_of(*network.kernels, x, sequences.steps, sequences.batch, network.input(), false);
    sequences.input.rows = {rows.data, rows.step, rows.row};
  }
  sequences.output = rows_of(*network.kernels, output, output.shape(0), sequences.batch, units, true);
  return sequences;
}

void run_network(const HeldNetwork& network, const py::array& x, const std::vector<const void*>& before,
                 const py::array& output, const std::vector<void*>& after, Size batch, const HeldSchedule* schedule) {
  const Sequences sequences = sequences_of(network, x, network.output(), output);
  const bool ends_time = std::any_of(network.nodes.begin(), network.nodes.end(),
                                     [](const Node& node) { return node.kind == Node::Kind::last; });
  const Size steps = sequences.steps;
  require(sequences.batch == batch && output.shape(0) == (ends_time ? 1 : steps),
          "internal: another batch, or other steps");
  const Schedule rows_and_resets = schedule ? schedule->checked(steps, batch) : Schedule{};
  require(!rows_and_resets.resets || !network.masks_or_reverses(), "internal: resets where steps change their places");
  if (batch == 0) return;
  without_gil(network.operations(batch) * std::clamp<Size>(steps, 1, gil_operations), [&](Interrupt* interrupt) {
    Run run;
    run.lay_out(network, steps, batch, rows_and_resets, 0);
    const Buffer memory(static_cast<std::size_t>(run.bytes()));
    run.place(memory.data(), before.data(), after.data());
    run(sequences.input, sequences.output, interrupt);
  });
}

bool HeldNetwork::is_like(const HeldNetwork& other) const {
  const auto same = [](const Node& a, const Node& b) {
    return a.kind == b.kind && a.input == b.input && a.output == b.output && a.taps == b.taps &&
           a.dilation == b.dilation && a.left == b.left && a.stack.layers == b.stack.layers &&
           a.stack.directions == b.stack.directions &&
           (a.kind != Node::Kind::recurrent ||
            (a.stack.layer->cell == b.stack.layer->cell && a.stack.layer->hidden == b.stack.layer->hidden));
  };
  return type_number() == other.type_number() &&
         std::equal(nodes.begin(), nodes.end(), other.nodes.begin(), other.nodes.end(), same);
}

// ---- states -----------------------------------------------------------------------------------------------------

StateBlock::StateBlock(const HeldNetwork& network, Size batch) {
  std::size_t total = 0;
  for (const StatePart& part : network.state_parts) {
    Size elements = 0;
    if (__builtin_mul_overflow(part.count * part.units, batch, &elements) || elements > Size(1) << 46)
      throw std::bad_alloc();
    bytes.push_back(bytes_of_type(*network.kernels, part.count * batch * part.units));
    total += static_cast<std::size_t>(lines(bytes.back()));
  }
  memory_ = Buffer(total);
  char* next = static_cast<char*>(memory_.data());
  for (const Size size : bytes) {
    pointers.push_back(next);
    next += lines(size);
  }
  clear();
}

void StateBlock::copy_from(const StateBlock& other) {
  std::memcpy(memory_.data(), other.memory_.data(), memory_.bytes());
}

void StateBlock::clear() { std::memset(memory_.data(), 0, memory_.bytes()); }

void StateBlock::clear_row(const HeldNetwork& network, Size batch, Size row) {
  for (std::size_t i = 0; i < pointers.size(); ++i) {
    const StatePart& part = network.state_parts[i];
    const Size width = bytes_of_type(*network.kernels, part.units);
    for (Size n = 0; n < part.count; ++n)
      std::memset(static_cast<char*>(pointers[i]) + (n * batch + row) * width, 0, static_cast<std::size_t>(width));
  }
}

void check_parts(const std::vector<py::array>& arrays, const std::vector<Size>& bytes) {
  require(arrays.size() == bytes.size(), "internal: another number of states");
  for (std::size_t i = 0; i < bytes.size(); ++i)
    require(arrays[i].nbytes() == bytes[i] && (arrays[i].flags() & py::array::c_style),
            "internal: a state of the wrong size");
}

void StateBlock::copy_out(const std::vector<py::array>& arrays) const {
  check_parts(arrays, bytes);
  for (std::size_t i = 0; i < arrays.size(); ++i)
    std::memcpy(py::array(arrays[i]).mutable_data(), pointers[i], static_cast<std::size_t>(bytes[i]));
}

void StateBlock::copy_in(const std::vector<py::array>& arrays) {
  check_parts(arrays, bytes);
  for (std::size_t i = 0; i < arrays.size(); ++i)
    std::memcpy(pointers[i], arrays[i].data(), static_cast<std::size_t>(bytes[i]));
}

void bind_networks(py::module_& module) {
  using namespace py::literals;
  const auto backend_of = [](const auto& packed) { return packed.kernels->level; };
  py::class_<RowWeights, std::shared_ptr<RowWeights>>(module, "RowWeights")
      .def(py::init(&row_weights_of), "operation"_a, "dtype"_a, "input"_a, "output"_a, "function"_a, "epsilon"_a,
           "weights"_a)
      .def_property_readonly("backend", [=](const RowWeights& weights) { return backend_of(weights); });
  py::class_<Table, std::shared_ptr<Table>>(module, "Table")
      .def(py::init(&table_of), "array"_a)
      .def_readonly("backend", &Table::backend);
  py::class_<Sums, std::shared_ptr<Sums>>(module, "Sums").def(py::init(&sums_of), "packed"_a, "table"_a);
  py::class_<HeldNetwork, std::shared_ptr<HeldNetwork>>(module, "Network")
      .def(py::init(&network_of), "dtype"_a, "nodes"_a, "sums"_a = nullptr)
      .def_property_readonly("backend", [=](const HeldNetwork& network) { return backend_of(network); })
      .def("forward", forward, "x"_a, "before"_a, "output"_a, "after"_a, "schedule"_a = nullptr);
}

}  // namespace gatewise
