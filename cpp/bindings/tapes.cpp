// Recorded forwards, and their backward.
#include "interruption.hpp"
#include "packed.hpp"

namespace gatewise {
namespace {

// A recorded forward. Nobody else may write to its arrays: Python hands over copies and read-only views.
struct Tape {
  std::shared_ptr<const Packed> packed;
  py::array x, output;
  Array hidden;
  std::shared_ptr<const HeldSchedule> schedule;
  Buffer memory;
  Dropout dropout;
  Size checkpoint_every;

  Tape(std::shared_ptr<const Packed> weights, const py::array& x, const Array& hidden, const Array& cell,
       const py::array& output, const py::array& hidden_after, const Array& cell_after,
       std::shared_ptr<const HeldSchedule> held_schedule, Size checkpoint_every, double probability, std::uint64_t seed,
       std::uint64_t call_count)
      : packed(present(weights)),
        x(x),
        output(output),
        hidden(hidden),
        schedule(std::move(held_schedule)),
        dropout{probability, seed, call_count},
        checkpoint_every(checkpoint_every) {
    require(checkpoint_every >= 0, "internal: a negative distance of checkpoints");
    require(trains(packed->layer[0]), "internal: a cell that does not train");
    Forward call = forward_call(*packed, x, hidden, cell, output, hidden_after, cell_after, schedule.get());
    call.dropout = dropout;
    call.checkpoint_every = checkpoint_every;
    const Size size = packed->kernels->tape_size(call);
    memory = Buffer(static_cast<std::size_t>(size * packed->kernels->item_bytes));
    call.tape = memory.data();
    run_forward(*packed, call);
  }

  // The call of backward, without the gradients.
  Backward backward_call() const {
    Backward call{};
    call.stack = packed->stack();
    call.steps = x.shape(0);
    call.batch = x.shape(1);
    if (schedule) call.schedule = schedule->checked(call.steps, call.batch);
    call.checkpoint_every = checkpoint_every;
    call.input = read_rows(*packed, x, call.steps, call.batch, packed->input);
    call.output = read_rows(*packed, output, call.steps, call.batch, packed->output());
    call.hidden_before =
        flat(*packed, hidden, packed->layers * packed->directions * call.batch * packed->recurrent(), false);
    call.tape = memory.data();
    call.dropout = dropout;
    return call;
  }

  // Writes what a layer and direction did: kept [T, B, H] each, in the order of core/contract.hpp, carried [T, B, H] or
  // None, hidden [T, B, R].
  void trace(Size layer, Size direction, const std::vector<py::array>& kept, const Array& carried,
             const py::array& hidden_rows) const {
    const Backward call = backward_call();
    const Size all_rows = call.steps * call.batch;
    require(layer >= 0 && layer < packed->layers && direction >= 0 && direction < packed->directions &&
                checkpoint_every == 0 && static_cast<Size>(kept.size()) == kept_of(packed->layer[0].cell) &&
                carried.has_value() == packed->has_cell(),
            "internal: a trace of something else");
    std::vector<void*> values;
    for (const py::array& value : kept) values.push_back(flat(*packed, value, all_rows * packed->hidden, true));
    const Trace memory_of_trace{layer, direction, values.data(),
                                flat(*packed, carried, all_rows * packed->hidden, true),
                                flat(*packed, hidden_rows, all_rows * packed->recurrent(), true)};
    without_gil(all_rows * packed->hidden * static_cast<Size>(kept.size()),
                [&] { packed->kernels->trace(call, memory_of_trace); });
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
    call.grad_input = rows_of(*packed, grad_x, call.steps, call.batch, packed->input, true);
    call.grad_hidden_before = flat(*packed, grad_hidden_before, states * recurrent, true);
    call.grad_cell_before = flat(*packed, grad_cell_before, states * hidden_size, true);
    require(packed->has_cell() == grad_cell_before.has_value(), "internal: a cell state for LSTM only");
    require(static_cast<Size>(gradients.size()) == sequences,
            "internal: expected one set of gradients for each layer and direction");

    std::vector<Gradients> gradients_of_layers;
    for (Size i = 0; i < sequences; ++i) {
      const Layer& layer = packed->layer[i];
      const Size gates = gates_of(layer.cell) * layer.hidden;
      const std::vector<Array>& arrays = gradients[i];
      require(arrays.size() == 6 && arrays[0] && arrays[1] && arrays[4].has_value() == (layer.projection > 0),
              "internal: expected six gradients for each layer and direction");
      gradients_of_layers.push_back({flat(*packed, arrays[0], gates * layer.input, true),
                                     flat(*packed, arrays[1], gates * recurrent, true),
                                     flat(*packed, arrays[2], gates, true), flat(*packed, arrays[3], gates, true),
                                     flat(*packed, arrays[4], layer.projection * layer.hidden, true)});
    }
    call.gradients = gradients_of_layers.data();
    call.threads = packed->threads(call.steps, call.batch);
    run_backward(*packed, call);
  }
};

}  // namespace

void bind_tapes(py::module_& module) {
  using namespace py::literals;
  py::class_<Tape>(module, "Tape")
      .def(py::init<std::shared_ptr<const Packed>, const py::array&, const Array&, const Array&, const py::array&,
                    const py::array&, const Array&, std::shared_ptr<const HeldSchedule>, Size, double, std::uint64_t,
                    std::uint64_t>(),
           "packed"_a, "x"_a, "hidden"_a, "cell"_a, "output"_a, "hidden_after"_a, "cell_after"_a, "schedule"_a,
           "checkpoint_every"_a, "probability"_a, "seed"_a, "call_count"_a)
      .def_property_readonly("nbytes", [](const Tape& tape) { return tape.memory.bytes(); })
      .def("trace", &Tape::trace, "layer"_a, "direction"_a, "kept"_a, "carried"_a, "hidden"_a)
      .def("backward", &Tape::backward, "grad_output"_a, "grad_hidden"_a, "grad_cell"_a, "grad_x"_a,
           "grad_hidden_before"_a, "grad_cell_before"_a, "gradients"_a);
}

}  // namespace gatewise
