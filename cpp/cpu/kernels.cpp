// One CPU level and dtype of the table in core/contract.hpp. CMake compiles this file once for each, with that level's
// flags, with GATEWISE_KERNEL for the namespace (v3_float32), GATEWISE_REAL for the type, and with Eigen renamed
// likewise: two objects that shared an inline function would share its machine code, whichever the linker kept.
// Hence also no standard containers, no exceptions, no static locals, no allocation here. Only the table is exported;
// tests/test_symbols.py watches over it.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../core/contract.hpp"

#include "../cell/gru.hpp"
#include "../cell/lstm.hpp"
#include "../cell/rnn.hpp"
#include "fingerprint.hpp"
#include "rows.hpp"
#include "stack.hpp"

namespace gatewise::GATEWISE_KERNEL {
namespace {

// Whether the contract says of a cell what its file says.
template <class Type>
constexpr bool agrees(Cell cell) {
  return gates_of(cell) == Type::gates && kept_of(cell) == Type::kept && carries(cell) == Type::carried &&
         has_cell_state(cell) == (Type::carried && !Type::carries_hidden) && trains(cell) == Type::trains;
}
static_assert(agrees<Lstm>(Cell::lstm) && agrees<Gru>(Cell::gru) && agrees<GruResetBefore>(Cell::gru_reset_before) &&
              agrees<RnnTanh>(Cell::rnn_tanh) && agrees<RnnRelu>(Cell::rnn_relu));

// Calls function(cell) with the type that belongs to the kind.
template <class Function>
auto with_cell(Cell cell, const Function& function) {
  switch (cell) {
    case Cell::lstm:
      return function(Lstm());
    case Cell::gru:
      return function(Gru());
    case Cell::gru_reset_before:
      return function(GruResetBefore());
    case Cell::rnn_tanh:
      return function(RnnTanh());
    case Cell::rnn_relu:
      return function(RnnRelu());
  }
  __builtin_unreachable();  // the compiler warns of a cell that is missing above
}

Size packed_size(const Layer& layer) {
  return with_cell(layer.cell, [&](auto cell) {
    Arena arena{nullptr};
    Panels<decltype(cell)>(arena, layer);
    return arena.used;
  });
}

void pack(const Layer& layer, const Weights& weights, void* packed) {
  const FloatingPointMode mode;  // biases are added
  with_cell(layer.cell, [&](auto cell) { pack_weights<decltype(cell)>(layer, weights, static_cast<Real*>(packed)); });
}

// The same for cells that train; the others are not asked for.
template <class Function>
auto with_trained_cell(Cell cell, const Function& function) {
  return with_cell(cell, [&](auto of) {
    if constexpr (decltype(of)::trains)
      return function(of);
    else
      return decltype(function(Lstm()))();
  });
}

// Without rows there is nothing to walk through, be it in a number of steps that no loop can count.
template <class SomeCall>
SomeCall without_empty_steps(SomeCall call) {
  if (call.batch == 0) call.steps = 0;
  return call;
}

Size tape(const Forward& call) {
  return with_cell(call.stack.layer->cell,
                   [&](auto cell) { return tape_size<decltype(cell)>(without_empty_steps(call)); });
}

Size scratch_forward(const Forward& call) {
  return with_cell(call.stack.layer->cell,
                   [&](auto cell) { return forward_scratch<decltype(cell)>(without_empty_steps(call)); });
}

Size scratch_backward(const Backward& call) {
  return with_trained_cell(call.stack.layer->cell,
                           [&](auto cell) { return backward_scratch<decltype(cell)>(without_empty_steps(call)); });
}

Status forward(const Forward& call) {
  return with_cell(call.stack.layer->cell,
                   [&](auto cell) { return run_forward<decltype(cell)>(without_empty_steps(call)); });
}

Status backward(const Backward& call) {
  return with_trained_cell(call.stack.layer->cell,
                           [&](auto cell) { return run_backward<decltype(cell)>(without_empty_steps(call)); });
}

void trace(const Backward& call, const Trace& wanted) {
  const FloatingPointMode mode;  // cell states are made anew
  with_trained_cell(call.stack.layer->cell,
                    [&](auto cell) { run_trace<decltype(cell)>(without_empty_steps(call), wanted); });
}

Size input_sums_size(const Layer& layer) {
  return with_cell(layer.cell, [&](auto cell) { return panels_of(layer.hidden) * decltype(cell)::sums * lanes; });
}

void input_sums(const Layer& layer, Size rows, const void* input, Size input_row, void* sums) {
  const FloatingPointMode mode;
  with_cell(layer.cell, [&](auto cell) {
    make_input_sums<decltype(cell)>(layer, rows, static_cast<const Real*>(input), input_row, static_cast<Real*>(sums));
  });
}

Size rows_packed_size(const RowFunction& function) {
  Arena arena{nullptr};
  RowPanels(arena, function);
  return arena.used;
}

void pack_rows(const RowFunction& function, const void* const* weights, void* packed) {
  pack_row_function(function, weights, static_cast<Real*>(packed));
}

// The system may give fewer threads than it was asked for, each with more rows.
Size rows_scratch(const RowFunction& function, Size rows, int threads) {
  return threads * row_function_scratch(function, rows);
}

// Where rows do not follow each other at one distance those of one place in the batch do, step after step.
void apply_rows(const RowFunction& function, Size steps, Size batch, Rows<const void*> input, Rows<void*> output,
                void* scratch, int threads) {
  const Size input_row = distance_of(input, steps, batch), output_row = distance_of(output, steps, batch);
  const auto* from = static_cast<const Real*>(input.data);
  auto* to = static_cast<Real*>(output.data);
  run_team(threads, [&](const Team& team) {
    Real* own_scratch = static_cast<Real*>(scratch) + team.rank * row_function_scratch(function, steps * batch);
    const bool even = input_row >= 0 && output_row >= 0;
    const Team::Share own = team.share(even ? steps * batch : batch);
    if (even)
      return apply_to_rows(function, own.count(), from + own.begin * input_row, input_row, to + own.begin * output_row,
                           output_row, own_scratch);
    for (Size b = own.begin; b < own.end; ++b)
      apply_to_rows(function, steps, from + b * input.row, input.step, to + b * output.row, output.step, own_scratch);
  });
}

void evaluate(const Function& function, Size count, const void* x, void* y) {
  const FloatingPointMode mode;
  with_activation(function, [&](const auto& activation) {
    each_register(count, [&](Size i, Size left) {
      store_first(activation(load_first(static_cast<const Real*>(x) + i, left)), static_cast<Real*>(y) + i, left);
    });
  });
}

Size multiply_add(Size repetitions) {
  constexpr int chains = 12;
  Register sums[chains], total = Register::broadcast(0);
  const Register factor = Register::broadcast(Real(0.5)), term = Register::broadcast(1);
  repeat<chains>([&](int i) GATEWISE_LAMBDA { sums[i] = Register::broadcast(Real(i)); });
  for (Size n = 0; n < repetitions; ++n)
    repeat<chains>([&](int i) GATEWISE_LAMBDA { sums[i] = in_register(fused(sums[i], factor, term)); });
  // All chains are used, or the compiler would leave them out: each tends to 2, their sum is not negative.
  repeat<chains>([&](int i) GATEWISE_LAMBDA { total = total + sums[i]; });
  Real first[lanes];
  total.store(first);
  return first[0] < 0 ? 0 : 2 * chains * lanes * repetitions;
}

Size read(const void* data, Size count, Size repetitions) {
  constexpr int streams = 8;
  const Size blocks = count / (streams * lanes);
  Register sums[streams], total = Register::broadcast(0);
  repeat<streams>([&](int i) GATEWISE_LAMBDA { sums[i] = total; });
  for (Size n = 0; n < repetitions; ++n) {
    const Real* from = static_cast<const Real*>(data);
    for (Size block = 0; block < blocks; ++block, from += streams * lanes)
      repeat<streams>([&](int i)
                          GATEWISE_LAMBDA { sums[i] = in_register(sums[i] + Register::load(from + i * lanes)); });
  }
  repeat<streams>([&](int i) GATEWISE_LAMBDA { total = total + sums[i]; });
  Real first[lanes];
  total.store(first);
  // The sum is used, or the compiler would leave it out; of zeros it is zero.
  return first[0] != 0 ? 0 : blocks * streams * lanes * static_cast<Size>(sizeof(Real)) * repetitions;
}

std::uint64_t fingerprint(const Memory* pieces, Size count) {
  Fingerprint all;
  for (Size i = 0; i < count; ++i) all.add(pieces[i]);
  return all.value();
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    .level = GATEWISE_NAME,
    .item_bytes = sizeof(Real),
    .lanes = lanes,
    .packed_size = packed_size,
    .pack = pack,
    .tape_size = tape,
    .forward_scratch = scratch_forward,
    .backward_scratch = scratch_backward,
    .forward = forward,
    .backward = backward,
    .trace = trace,
    .input_sums_size = input_sums_size,
    .input_sums = input_sums,
    .rows_packed_size = rows_packed_size,
    .pack_rows = pack_rows,
    .rows_scratch = rows_scratch,
    .apply_rows = apply_rows,
    .evaluate = evaluate,
    .multiply_add = multiply_add,
    .read = read,
    .fingerprint = fingerprint,
};

}  // namespace gatewise::GATEWISE_KERNEL
