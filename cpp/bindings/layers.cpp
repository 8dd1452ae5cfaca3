// Packed weights, forward, and the tape.
#include "python.hpp"

namespace gatewise {
namespace {

void* flat(const Packed& packed, const Array& array, Size size, bool writeable) {
  return flat(*packed.kernels, array, size, writeable);
}
Rows<void*> rows(const Packed& packed, const Array& array, Size steps, Size batch, Size units, bool writeable) {
  return array ? rows_of(*packed.kernels, *array, steps, batch, units, writeable) : Rows<void*>{nullptr, 0, 0};
}
Rows<const void*> read_rows(const Packed& packed, const Array& array, Size steps, Size batch, Size units) {
  const Rows<void*> found = rows(packed, array, steps, batch, units, false);
  return {found.data, found.step, found.row};
}

// gate, candidate and output, clip, peepholes.
using FormulaTuple = std::tuple<NamedFunction, NamedFunction, NamedFunction, double, bool>;

Formula formula_of(const FormulaTuple& given) {
  const auto& [gate, candidate, output, clip, peepholes] = given;
  const Formula formula{function_of(gate), function_of(candidate), function_of(output), clip, peepholes};
  for (const Function& one : {formula.gate, formula.candidate, formula.output})
    require(one.activation != Activation::softmax, "internal: a function of rows within a cell");
  return formula;
}

// One list (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ch) a layer and direction; None where there is
// none.
std::shared_ptr<Packed> packed_of(const std::string& cell, const py::dtype& dtype, Size input, Size hidden,
                                  Size projection, Size layers, Size directions,
                                  const std::vector<std::vector<Array>>& weights,
                                  const std::optional<FormulaTuple>& given) {
  require(dtype.num() == NPY_FLOAT || dtype.num() == NPY_DOUBLE, "dtype: expected float32 or float64");
  require(directions > 0 && layers >= 0 && layers <= static_cast<Size>(weights.size()),
          "internal: a set of weights a layer and direction");
  const Backend& backend = active_backend();
  const auto packed = std::make_shared<Packed>(dtype.num() == NPY_FLOAT ? *backend.float32 : *backend.float64,
                                               cell_of(cell), input, hidden, projection, layers, directions,
                                               given ? std::optional(formula_of(*given)) : std::nullopt);
  const bool peepholes = packed->formula && packed->formula->peepholes;
  require(!peepholes || packed->has_cell(), "internal: peepholes of a cell without c");
  require(weights.size() == packed->layer.size(), "internal: a set of weights a layer and direction");
  std::vector<Weights> canonical;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const std::vector<Array>& from = weights[i];
    const Size gates = gates_of(packed->layer[i].cell) * hidden;
    require(from.size() == 6 && from[0] && from[1] && from[4].has_value() == (projection > 0) &&
                from[5].has_value() == peepholes,
            "internal: six weights a layer and direction");
    canonical.push_back({flat(*packed, from[0], gates * packed->layer[i].input, false),
                         flat(*packed, from[1], gates * packed->recurrent(), false),
                         flat(*packed, from[2], gates, false), flat(*packed, from[3], gates, false),
                         flat(*packed, from[4], projection * hidden, false),
                         flat(*packed, from[5], 3 * hidden, false)});
  }
  without_gil(packed->operations(1), [&] { packed->pack(canonical); });
  return packed;
}

// A whole call but for its scratch, with states [L*D, B, .], which are contiguous.
Forward forward_call(const Packed& packed, const py::array& x, const Array& hidden, const Array& cell,
                     const py::array& output, const py::array& hidden_after, const Array& cell_after,
                     const Plan* plan) {
  Forward call = sequence_call(packed, x, output, plan);
  const Size states = packed.layers * packed.directions * call.batch;
  call.hidden_before = flat(packed, hidden, states * packed.recurrent(), false);
  call.cell_before = flat(packed, cell, states * packed.hidden, false);
  call.hidden_after = flat(packed, hidden_after, states * packed.recurrent(), true);
  call.cell_after = flat(packed, cell_after, states * packed.hidden, true);
  require(packed.has_cell() == cell_after.has_value(), "internal: a cell state for LSTM only");
  return call;
}

void forward(const Packed& packed, const py::array& x, const Array& hidden, const Array& cell, const py::array& output,
             const py::array& hidden_after, const Array& cell_after, const Plan* plan) {
  Forward call = forward_call(packed, x, hidden, cell, output, hidden_after, cell_after, plan);
  run_forward(packed, call);
}

// A recorded forward. Its arrays must not be written to by anyone else: Python hands over copies and read-only views.
struct Tape {
  std::shared_ptr<const Packed> packed;
  py::array x, output;
  Array hidden;
  std::shared_ptr<const Plan> plan;
  Buffer memory;
  Dropout dropout;
  Size checkpoint_every;

  Tape(std::shared_ptr<const Packed> weights, const py::array& x, const Array& hidden, const Array& cell,
       const py::array& output, const py::array& hidden_after, const Array& cell_after,
       std::shared_ptr<const Plan> given_plan, Size checkpoint_every, double probability, std::uint64_t seed,
       std::uint64_t call_count)
      : packed(present(weights)),
        x(x),
        output(output),
        hidden(hidden),
        plan(std::move(given_plan)),
        dropout{probability, seed, call_count},
        checkpoint_every(checkpoint_every) {
    require(checkpoint_every >= 0, "internal: a negative distance of checkpoints");
    require(trains(packed->layer[0]), "internal: a cell that does not train");
    Forward call = forward_call(*packed, x, hidden, cell, output, hidden_after, cell_after, plan.get());
    call.dropout = dropout;
    call.checkpoint_every = checkpoint_every;
    const Size size = packed->kernels->tape_size(call);
    memory = Buffer(static_cast<std::size_t>(size * packed->kernels->item_bytes));
    call.tape = memory.data();
    run_forward(*packed, call);
  }

  // The call that undoes forward, but for the gradients.
  Backward backward_call() const {
    Backward call{};
    call.stack = packed->stack();
    call.steps = x.shape(0);
    call.batch = x.shape(1);
    if (plan) call.schedule = plan->schedule(call.steps, call.batch);
    call.checkpoint_every = checkpoint_every;
    call.input = read_rows(*packed, x, call.steps, call.batch, packed->input);
    call.output = read_rows(*packed, output, call.steps, call.batch, packed->output());
    call.hidden_before =
        flat(*packed, hidden, packed->layers * packed->directions * call.batch * packed->recurrent(), false);
    call.tape = memory.data();
    call.dropout = dropout;
    return call;
  }

  // kept [T, B, H] as in core/contract.hpp, carried [T, B, H] or None, hidden [T, B, R]
  void trace(Size layer, Size direction, const std::vector<py::array>& kept, const Array& carried,
             const py::array& hidden_rows) const {
    const Backward call = backward_call();
    const Size rows_in_all = call.steps * call.batch;
    require(layer >= 0 && layer < packed->layers && direction >= 0 && direction < packed->directions &&
                checkpoint_every == 0 && static_cast<Size>(kept.size()) == kept_of(packed->layer[0].cell) &&
                carried.has_value() == packed->has_cell(),
            "internal: a trace of something else");
    std::vector<void*> values;
    for (const py::array& value : kept) values.push_back(flat(*packed, value, rows_in_all * packed->hidden, true));
    const Trace wanted{layer, direction, values.data(), flat(*packed, carried, rows_in_all * packed->hidden, true),
                       flat(*packed, hidden_rows, rows_in_all * packed->recurrent(), true)};
    without_gil(rows_in_all * packed->hidden * static_cast<Size>(kept.size()),
                [&] { packed->kernels->trace(call, wanted); });
  }

  void backward(const Array& grad_output, const Array& grad_hidden, const Array& grad_cell, const py::array& grad_x,
                const py::array& grad_hidden_before, const Array& grad_cell_before,
                const std::vector<std::vector<Array>>& gradients) const {
    Backward call = backward_call();
    const Size sequences = packed->layers * packed->directions, states = sequences * call.batch;
    const Size recurrent = packed->recurrent(), hidden_size = packed->hidden;
    call.grad_output = read_rows(*packed, grad_output, call.steps, call.batch, packed->output());
    call.grad_hidden_after = flat(*packed, grad_hidden, states * recurrent, false);
    call.grad_cell_after = flat(*packed, grad_cell, states * hidden_size, false);
    call.grad_input = rows(*packed, grad_x, call.steps, call.batch, packed->input, true);
    call.grad_hidden_before = flat(*packed, grad_hidden_before, states * recurrent, true);
    call.grad_cell_before = flat(*packed, grad_cell_before, states * hidden_size, true);
    require(packed->has_cell() == grad_cell_before.has_value(), "internal: a cell state for LSTM only");
    require(static_cast<Size>(gradients.size()) == sequences, "internal: a set of gradients a layer and direction");

    std::vector<Gradients> of_layer;
    for (Size i = 0; i < sequences; ++i) {
      const Layer& layer = packed->layer[i];
      const Size gates = gates_of(layer.cell) * layer.hidden;
      const std::vector<Array>& to = gradients[i];
      require(to.size() == 6 && to[0] && to[1] && to[4].has_value() == (layer.projection > 0),
              "internal: six gradients a layer and direction");
      of_layer.push_back({flat(*packed, to[0], gates * layer.input, true),
                          flat(*packed, to[1], gates * recurrent, true), flat(*packed, to[2], gates, true),
                          flat(*packed, to[3], gates, true),
                          flat(*packed, to[4], layer.projection * layer.hidden, true)});
    }
    call.gradients = of_layer.data();
    call.threads = packed->threads(call.steps, call.batch);
    run_backward(*packed, call);
  }
};

}  // namespace

void* flat(const Kernels& kernels, const Array& array, Size size, bool writeable) {
  if (!array) return nullptr;
  auto* raw = reinterpret_cast<PyArrayObject*>(array->ptr());
  require(PyArray_TYPE(raw) == type_number_of(kernels) && PyArray_ISCARRAY_RO(raw) && PyArray_SIZE(raw) == size &&
              (!writeable || PyArray_ISWRITEABLE(raw)),
          "internal: an array of the wrong dtype, size or layout");
  return PyArray_DATA(raw);
}

Rows<void*> rows_of(const Kernels& kernels, const py::array& array, Size steps, Size batch, Size units,
                    bool writeable) {
  auto* raw = reinterpret_cast<PyArrayObject*>(array.ptr());
  const Size item = kernels.item_bytes;
  require(PyArray_TYPE(raw) == type_number_of(kernels) && PyArray_ISNOTSWAPPED(raw) && PyArray_ISALIGNED(raw) &&
              PyArray_NDIM(raw) == 3 && PyArray_DIM(raw, 0) == steps && PyArray_DIM(raw, 1) == batch &&
              PyArray_DIM(raw, 2) == units &&
              (PyArray_STRIDE(raw, 2) == item || units <= 1 || PyArray_SIZE(raw) == 0) &&
              PyArray_STRIDE(raw, 0) % item == 0 && PyArray_STRIDE(raw, 1) % item == 0 &&
              (!writeable || PyArray_ISWRITEABLE(raw)),
          "internal: rows of the wrong dtype, shape or layout");
  return {PyArray_DATA(raw), PyArray_STRIDE(raw, 0) / item, PyArray_STRIDE(raw, 1) / item};
}

Forward sequence_call(const Packed& packed, const py::array& x, const py::array& output, const Plan* plan) {
  require(x.ndim() == 3, "internal: x is not three-dimensional");
  Forward call{};
  call.stack = packed.stack();
  call.steps = x.shape(0);
  call.batch = x.shape(1);
  call.input = read_rows(packed, x, call.steps, call.batch, packed.input);
  call.output = rows(packed, output, call.steps, call.batch, packed.output(), true);
  if (plan) call.schedule = plan->schedule(call.steps, call.batch);
  call.threads = packed.threads(call.steps, call.batch);
  return call;
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

Cell cell_of(const std::string& name) {
  if (name == "lstm") return Cell::lstm;
  if (name == "gru") return Cell::gru;
  if (name == "gru_reset_before") return Cell::gru_reset_before;
  if (name == "rnn_tanh") return Cell::rnn_tanh;
  if (name == "rnn_relu") return Cell::rnn_relu;
  throw py::value_error("cell: expected lstm, gru, rnn_tanh or rnn_relu, got " + name);
}

Packed::Packed(const Kernels& kernels, Cell cell, Size input, Size hidden, Size projection, Size layers,
               Size directions, std::optional<Formula> given)
    : kernels(&kernels),
      input(input),
      hidden(hidden),
      projection(projection),
      layers(layers),
      directions(directions),
      formula(std::move(given)) {
  require(input > 0 && hidden > 0 && projection >= 0 && layers > 0 && (directions == 1 || directions == 2),
          "internal: sizes do not fit");
  for (Size i = 0; i < layers * directions; ++i)
    layer.push_back(
        {cell, i < directions ? input : output(), hidden, projection, nullptr, formula ? &*formula : nullptr});
}

Size Packed::bytes() const {
  Size bytes = 0;
  for (const Layer& one : layer) bytes += lines(kernels->packed_size(one) * kernels->item_bytes);
  return bytes;
}

void Packed::place(const void* packed) {
  auto* next = static_cast<const char*>(packed);
  for (Layer& one : layer) {
    one.packed = next;
    next += lines(kernels->packed_size(one) * kernels->item_bytes);
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

void bind_layers(py::module_& module) {
  using namespace py::literals;
  py::class_<Packed, std::shared_ptr<Packed>>(module, "Packed")
      .def(py::init(&packed_of), "cell"_a, "dtype"_a, "input"_a, "hidden"_a, "projection"_a, "layers"_a, "directions"_a,
           "weights"_a, "formula"_a = std::nullopt)
      .def_property_readonly("backend", [](const Packed& packed) { return packed.kernels->level; })
      .def("forward", forward, "x"_a, "hidden"_a, "cell"_a, "output"_a, "hidden_after"_a, "cell_after"_a,
           "plan"_a = nullptr);
  py::class_<Tape>(module, "Tape")
      .def(py::init<std::shared_ptr<const Packed>, const py::array&, const Array&, const Array&, const py::array&,
                    const py::array&, const Array&, std::shared_ptr<const Plan>, Size, double, std::uint64_t,
                    std::uint64_t>(),
           "packed"_a, "x"_a, "hidden"_a, "cell"_a, "output"_a, "hidden_after"_a, "cell_after"_a, "plan"_a,
           "checkpoint_every"_a, "probability"_a, "seed"_a, "call_count"_a)
      .def_property_readonly("nbytes", [](const Tape& tape) { return tape.memory.bytes(); })
      .def("trace", &Tape::trace, "layer"_a, "direction"_a, "kept"_a, "carried"_a, "hidden"_a)
      .def("backward", &Tape::backward, "grad_output"_a, "grad_hidden"_a, "grad_cell"_a, "grad_x"_a,
           "grad_hidden_before"_a, "grad_cell_before"_a, "gradients"_a);
}

}  // namespace gatewise
