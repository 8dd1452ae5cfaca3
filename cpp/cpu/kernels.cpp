// The table of core/contract.hpp for one CPU level and dtype. CMake compiles this file once for each of them, with that
// level's flags, GATEWISE_KERNEL as the namespace (v3_float32), GATEWISE_REAL as the type, and Eigen renamed like the
// namespace: if two objects had the same inline function, both would run the machine code of whichever the linker kept.
// So there are also no standard containers, no exceptions, no static locals and no allocation here. Only the table is
// exported; tests/promises/test_symbols.py checks it.
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

// Calls function(Type()) with the type of the cell.
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

// The same for cells that train. It is never called for others.
template <class Function>
auto with_trained_cell(Cell cell, const Function& function) {
  return with_cell(cell, [&](auto type) {
    if constexpr (decltype(type)::trains)
      return function(type);
    else
      return decltype(function(Lstm()))();
  });
}

// A call without rows needs no steps, of which there may be more than any loop can count.
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

void trace(const Backward& call, const Trace& trace) {
  const FloatingPointMode mode;  // cell states are computed
  with_trained_cell(call.stack.layer->cell,
                    [&](auto cell) { run_trace<decltype(cell)>(without_empty_steps(call), trace); });
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

// The system may start fewer threads than it was asked for, each of which then has more rows.
Size rows_scratch(const RowFunction& function, Size rows, int threads) {
  return threads * row_function_scratch(function, rows);
}

// If the distance between rows varies, each row of the batch is taken by itself: its steps lie at one distance.
void apply_rows(const RowFunction& function, Size steps, Size batch, Rows<const void*> input, Rows<void*> output,
                void* scratch, int threads) {
  const Size input_row = distance_of(input, steps, batch), output_row = distance_of(output, steps, batch);
  const auto* from = static_cast<const Real*>(input.data);
  auto* to = static_cast<Real*>(output.data);
  run_team(threads, [&](const Team& team) {
    Real* thread_scratch = static_cast<Real*>(scratch) + team.rank * row_function_scratch(function, steps * batch);
    const bool even = input_row >= 0 && output_row >= 0;
    const Team::Share share = team.share(even ? steps * batch : batch);
    if (even)
      return apply_to_rows(function, share.count(), from + share.begin * input_row, input_row,
                           to + share.begin * output_row, output_row, thread_scratch);
    for (Size b = share.begin; b < share.end; ++b)
      apply_to_rows(function, steps, from + b * input.row, input.step, to + b * output.row, output.step,
                    thread_scratch);
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
  // Uses all chains, or the compiler would leave them out: each tends to 2, so their sum is not negative.
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
  // Uses the sum, or the compiler would leave it out. The data are zeros, and so is their sum.
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
