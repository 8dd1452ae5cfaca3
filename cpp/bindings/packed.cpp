// Packed weights, and the calls that run them.
#include "packed.hpp"

#include "interruption.hpp"

namespace gatewise {
namespace {

// gate, candidate, output, clip, peepholes
using FormulaTuple = std::tuple<NamedFunction, NamedFunction, NamedFunction, double, bool>;

Formula formula_of(const FormulaTuple& tuple) {
  const auto& [gate, candidate, output, clip, peepholes] = tuple;
  const Formula formula{function_of(gate), function_of(candidate), function_of(output), clip, peepholes};
  for (const Function& function : {formula.gate, formula.candidate, formula.output})
    require(function.activation != Activation::softmax, "internal: a function of rows within a cell");
  return formula;
}

// What Python must know of each cell, so that it repeats no number of the core.
py::dict cells_by_name() {
  using namespace py::literals;
  py::dict by_name;
  for (const auto& [name, cell] : cells)
    by_name[name] = py::dict("gates"_a = gates_of(cell), "kept"_a = kept_of(cell), "carried"_a = carries(cell),
                             "has_cell_state"_a = has_cell_state(cell), "trains"_a = trains(cell));
  return by_name;
}

// weights: for each layer and direction weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and weight_ch, or None in
// place of those that it does not have.
std::shared_ptr<Packed> packed_of(const std::string& cell, const py::dtype& dtype, Size input, Size hidden,
                                  Size projection, Size layers, Size directions,
                                  const std::vector<std::vector<Array>>& weights,
                                  const std::optional<FormulaTuple>& formula) {
  const Kernels& kernels = kernels_for(dtype);
  require(directions > 0 && layers >= 0 && layers <= static_cast<Size>(weights.size()),
          "internal: expected one set of weights for each layer and direction");
  const auto packed = std::make_shared<Packed>(kernels, cell_of(cell), input, hidden, projection, layers, directions,
                                               formula ? std::optional(formula_of(*formula)) : std::nullopt);
  const bool peepholes = packed->formula && packed->formula->peepholes;
  require(!peepholes || packed->has_cell(), "internal: peepholes of a cell without c");
  require(weights.size() == packed->layer.size(), "internal: expected one set of weights for each layer and direction");
  std::vector<Weights> canonical;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const std::vector<Array>& arrays = weights[i];
    const Size gates = gates_of(packed->layer[i].cell) * hidden;
    require(arrays.size() == 6 && arrays[0] && arrays[1] && arrays[4].has_value() == (projection > 0) &&
                arrays[5].has_value() == peepholes,
            "internal: expected six weights for each layer and direction");
    canonical.push_back({flat(*packed, arrays[0], gates * packed->layer[i].input, false),
                         flat(*packed, arrays[1], gates * packed->recurrent(), false),
                         flat(*packed, arrays[2], gates, false), flat(*packed, arrays[3], gates, false),
                         flat(*packed, arrays[4], projection * hidden, false),
                         flat(*packed, arrays[5], 3 * hidden, false)});
  }
  without_gil(packed->operations(1), [&] { packed->pack(canonical); });
  return packed;
}

Size tape_bytes_of(const std::string& cell, const py::dtype& dtype, Size input, Size hidden, Size projection,
                   Size layers, Size directions, Size steps, Size batch, Size checkpoint_every) {
  const Size max_sequences = 1 << 20;
  require(layers <= max_sequences && steps >= 0 && batch >= 0 && checkpoint_every >= 0, "internal: sizes do not fit");
  const Packed packed(kernels_for(dtype), cell_of(cell), input, hidden, projection, layers, directions);
  require(trains(packed.layer[0]), "internal: a cell that does not train");
  return tape_bytes(packed, steps, batch, checkpoint_every);
}

void forward(const Packed& packed, const py::array& x, const Array& hidden, const Array& cell, const py::array& output,
             const py::array& hidden_after, const Array& cell_after, const HeldSchedule* schedule) {
  Forward call = forward_call(packed, x, hidden, cell, output, hidden_after, cell_after, schedule);
  run_forward(packed, call);
}

}  // namespace

void* flat(const Packed& packed, const Array& array, Size size, bool writeable) {
  return flat(*packed.kernels, array, size, writeable);
}
Rows<void*> rows_of(const Packed& packed, const Array& array, Size steps, Size batch, Size units, bool writeable) {
  return array ? rows_of(*packed.kernels, *array, steps, batch, units, writeable) : Rows<void*>{nullptr, 0, 0};
}
Rows<const void*> read_rows(const Packed& packed, const Array& array, Size steps, Size batch, Size units) {
  const Rows<void*> rows = rows_of(packed, array, steps, batch, units, false);
  return {rows.data, rows.step, rows.row};
}

Forward forward_call(const Packed& packed, const py::array& x, const Array& hidden, const Array& cell,
                     const py::array& output, const py::array& hidden_after, const Array& cell_after,
                     const HeldSchedule* schedule) {
  require(x.ndim() == 3, "internal: x is not three-dimensional");
  Forward call{};
  call.stack = packed.stack();
  call.steps = x.shape(0);
  call.batch = x.shape(1);
  call.input = read_rows(packed, x, call.steps, call.batch, packed.input);
  call.output = rows_of(packed, output, call.steps, call.batch, packed.output(), true);
  if (schedule) call.schedule = schedule->checked(call.steps, call.batch);
  call.threads = packed.threads(call.steps, call.batch);
  const Size states = packed.layers * packed.directions * call.batch;
  call.hidden_before = flat(packed, hidden, states * packed.recurrent(), false);
  call.cell_before = flat(packed, cell, states * packed.hidden, false);
  call.hidden_after = flat(packed, hidden_after, states * packed.recurrent(), true);
  call.cell_after = flat(packed, cell_after, states * packed.hidden, true);
  require(packed.has_cell() == cell_after.has_value(), "internal: a cell state for LSTM only");
  return call;
}

Size tape_bytes(const Packed& packed, Size steps, Size batch, Size checkpoint_every) {
  constexpr double max_values = 1LL << 46;  // more than any machine has, well below where sizes overflow
  constexpr double values_of_unit = 8;      // at most, the output and the padding of panels included
  const double units = static_cast<double>(packed.hidden + packed.kernels->lanes) *
                       static_cast<double>(packed.layers * packed.directions);
  if (values_of_unit * units * static_cast<double>(steps) * static_cast<double>(batch) > max_values)
    throw std::bad_alloc();
  Forward call{};
  call.stack = packed.stack();
  call.steps = steps;
  call.batch = batch;
  call.checkpoint_every = checkpoint_every;
  return packed.kernels->tape_size(call) * packed.kernels->item_bytes;
}

Status compute(const Packed& packed, Forward& call) {
  const Size scratch = packed.kernels->forward_scratch(call);
  const Buffer buffer(static_cast<std::size_t>(scratch * packed.kernels->item_bytes));
  call.scratch = buffer.data();
  return packed.kernels->forward(call);
}

Status compute(const Packed& packed, Backward& call) {
  const Size scratch = packed.kernels->backward_scratch(call);
  const Buffer buffer(static_cast<std::size_t>(scratch * packed.kernels->item_bytes));
  call.scratch = buffer.data();
  return packed.kernels->backward(call);
}

void run_forward(const Packed& packed, Forward& call) {
  without_gil(packed.operations(call.batch) * call.steps, [&](Interrupt* interrupt) {
    call.interrupt = interrupt;
    compute(packed, call);
  });
}

void run_backward(const Packed& packed, Backward& call) {
  without_gil(2 * packed.operations(call.batch) * call.steps, [&](Interrupt* interrupt) {
    call.interrupt = interrupt;
    compute(packed, call);
  });
}

Packed::Packed(const Kernels& kernels, Cell cell, Size input, Size hidden, Size projection, Size layers,
               Size directions, std::optional<Formula> formula_of_cell)
    : kernels(&kernels),
      input(input),
      hidden(hidden),
      projection(projection),
      layers(layers),
      directions(directions),
      formula(std::move(formula_of_cell)) {
  require(input > 0 && hidden > 0 && projection >= 0 && layers > 0 && (directions == 1 || directions == 2),
          "internal: sizes do not fit");
  for (Size i = 0; i < layers * directions; ++i)
    layer.push_back(
        {cell, i < directions ? input : output(), hidden, projection, nullptr, formula ? &*formula : nullptr});
}

Size Packed::bytes() const {
  Size bytes = 0;
  for (const Layer& sequence : layer) bytes += lines(kernels->packed_size(sequence) * kernels->item_bytes);
  return bytes;
}

void Packed::place(const void* packed) {
  auto* next = static_cast<const char*>(packed);
  for (Layer& sequence : layer) {
    sequence.packed = next;
    next += lines(kernels->packed_size(sequence) * kernels->item_bytes);
  }
}

void Packed::pack(const std::vector<Weights>& weights, void* packed) {
  place(packed);
  for (std::size_t i = 0; i < layer.size(); ++i)
    kernels->pack(layer[i], weights[i], const_cast<void*>(layer[i].packed));  // within `packed`
}

void Packed::pack(const std::vector<Weights>& weights) {
  memory = Buffer(static_cast<std::size_t>(bytes()));
  pack(weights, memory.data());
}

void bind_packed(py::module_& module) {
  using namespace py::literals;
  module.def("cells", cells_by_name);
  module.def("tape_bytes", tape_bytes_of, "cell"_a, "dtype"_a, "input"_a, "hidden"_a, "projection"_a, "layers"_a,
             "directions"_a, "steps"_a, "batch"_a, "checkpoint_every"_a = 0);
  py::class_<Packed, std::shared_ptr<Packed>>(module, "Packed")
      .def(py::init(&packed_of), "cell"_a, "dtype"_a, "input"_a, "hidden"_a, "projection"_a, "layers"_a, "directions"_a,
           "weights"_a, "formula"_a = std::nullopt)
      .def_property_readonly("backend", [](const Packed& packed) { return packed.kernels->level; })
      .def("forward", forward, "x"_a, "hidden"_a, "cell"_a, "output"_a, "hidden_after"_a, "cell_after"_a,
           "schedule"_a = nullptr);
}

}  // namespace gatewise
