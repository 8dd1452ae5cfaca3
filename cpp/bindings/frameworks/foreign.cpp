#include "foreign.hpp"

#include <algorithm>

namespace gatewise {
namespace {

template <class Pointer = void*>
Pointer pointer_to(Address address) {
  return reinterpret_cast<Pointer>(address);
}

template <class Pointer>
Rows<Pointer> rows_at(const AddressedRows& rows) {
  return {pointer_to<Pointer>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
}

// The method as Python calls it: without the GIL.
template <class... Arguments>
auto without_gil_at(void (ForeignCall::*method)(Interrupt*, Arguments...) const) {
  return [method](const ForeignCall& call, Arguments... arguments) {
    without_gil(call.operations(), [&](Interrupt* interrupt) { (call.*method)(interrupt, arguments...); });
  };
}

}  // namespace

template <class SomeCall>
SomeCall ForeignCall::start() const {
  SomeCall call{};
  call.stack = packed->stack();
  call.steps = steps;
  call.batch = batch;
  if (schedule) call.schedule = schedule->checked(steps, batch);
  call.checkpoint_every = checkpoint_every;
  call.dropout = {probability, seed, 0};
  call.threads = std::min(max_threads, packed->threads(steps, batch));
  return call;
}

Size ForeignCall::tape_bytes() const {
  return packed->kernels->tape_size(start<Forward>()) * packed->kernels->item_bytes;
}

void ForeignCall::forward(Interrupt* interrupt, const AddressedRows& x, Address hidden, Address cell,
                          const AddressedRows& output, Address hidden_after, Address cell_after, Address tape) const {
  Forward call = start<Forward>();
  call.input = rows_at<const void*>(x);
  call.hidden_before = pointer_to(hidden);
  call.cell_before = pointer_to(cell);
  call.output = rows_at<void*>(output);
  call.hidden_after = pointer_to(hidden_after);
  call.cell_after = pointer_to(cell_after);
  call.tape = pointer_to(tape);
  call.interrupt = interrupt;
  compute(*packed, call);
}

void ForeignCall::backward(Interrupt* interrupt, const AddressedRows& x, Address hidden, const AddressedRows& output,
                           Address tape, const AddressedRows& grad_output, Address grad_hidden, Address grad_cell,
                           const AddressedRows& grad_x, Address grad_hidden_before, Address grad_cell_before,
                           const std::vector<std::array<Address, 5>>& gradients) const {
  if (gradients.size() != packed->layer.size())
    throw py::value_error("internal: expected five gradients for each layer and direction");
  Backward call = start<Backward>();
  call.input = rows_at<const void*>(x);
  call.hidden_before = pointer_to(hidden);
  call.output = rows_at<const void*>(output);
  call.tape = pointer_to(tape);
  call.grad_output = rows_at<const void*>(grad_output);
  call.grad_hidden_after = pointer_to(grad_hidden);
  call.grad_cell_after = pointer_to(grad_cell);
  call.grad_input = rows_at<void*>(grad_x);
  call.grad_hidden_before = pointer_to(grad_hidden_before);
  call.grad_cell_before = pointer_to(grad_cell_before);
  std::vector<Gradients> gradients_of_layers;
  for (const auto& five : gradients)
    gradients_of_layers.push_back(
        {pointer_to(five[0]), pointer_to(five[1]), pointer_to(five[2]), pointer_to(five[3]), pointer_to(five[4])});
  call.gradients = gradients_of_layers.data();
  call.interrupt = interrupt;
  compute(*packed, call);
}

void bind_foreign(py::module_& module) {
  using namespace py::literals;
  py::class_<ForeignCall>(module, "Foreign")
      .def(py::init([](std::shared_ptr<const Packed> packed, Size steps, Size batch,
                       std::shared_ptr<const HeldSchedule> schedule, Size checkpoint_every, double probability,
                       std::uint64_t seed, int max_threads) {
             if (steps < 0 || batch < 0 || checkpoint_every < 0 || max_threads < 1)
               throw py::value_error("internal: a negative size");
             return ForeignCall{present(packed),  steps,       batch, std::move(schedule),
                                checkpoint_every, probability, seed,  max_threads};
           }),
           "packed"_a, "steps"_a, "batch"_a, "schedule"_a, "checkpoint_every"_a, "probability"_a, "seed"_a,
           "max_threads"_a)
      .def_property_readonly("tape_bytes", &ForeignCall::tape_bytes)
      .def("forward", without_gil_at(&ForeignCall::forward))
      .def("backward", without_gil_at(&ForeignCall::backward));
}

}  // namespace gatewise
