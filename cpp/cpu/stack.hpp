// Stacks of layers, in one or both directions: one call, one team of threads, no allocation.
#pragma once

#include "backward.hpp"
#include "dropout.hpp"

namespace gatewise::GATEWISE_KERNEL {

template <class Pointer>
Rows<Pointer> rows_of(Real* data, Size batch, Size units) {
  return {data, batch * units, units};
}

// The tape of one layer. The output of the last layer is not stored: the caller owns it.
template <class Cell>
struct LayerTape {
  SequenceTape direction[2];
  Real* output = nullptr;  // [T, B, D*R], before dropout; not of the last layer

  LayerTape() = default;
  LayerTape(Arena& arena, const Call& call, Size layer) {
    const Stack& stack = call.stack;
    const Layer* first = stack.layer + layer * stack.directions;
    for (Size d = 0; d < stack.directions; ++d) direction[d] = SequenceTape(arena, Cell(), first[d], call, d == 1);
    output = arena.take(layer + 1 < stack.layers ? call.steps * call.batch * stack.directions * output_of(*first) : 0);
  }

  // Finds the tape of a layer in the tape of the call.
  static LayerTape find(const Call& call, Size layer) {
    Arena arena{static_cast<Real*>(call.tape)};
    for (Size below = 0; below < layer; ++below) LayerTape(arena, call, below);
    return LayerTape(arena, call, layer);
  }
};

template <class Cell>
Size tape_size(const Call& call) {
  Arena arena{nullptr};
  for (Size layer = 0; layer < call.stack.layers; ++layer) LayerTape<Cell>(arena, call, layer);
  return arena.used;
}

// Size of a buffer between two layers, [T, B, D*R], and how many of them a call needs: for a layer's input and output
// (or their gradients) unless the tape stores them, and for an input after dropout.
inline Size between_layers(const Call& call) {
  const Stack& stack = call.stack;
  return stack.layers > 1 ? call.steps * call.batch * stack.directions * output_of(*stack.layer) : 0;
}
inline bool drops(const Call& call) { return call.tape && call.dropout.probability > 0; }
inline int buffers_of(const Forward& call) { return call.tape ? drops(call) : 2; }
inline int buffers_of(const Backward& call) { return 2 + drops(call); }

template <class Scratch, class... Arguments>
Size largest_scratch(const Stack& stack, const Arguments&... arguments) {
  Size most = 0;
  for (Size i = 0; i < stack.layers * stack.directions; ++i) {
    Arena arena{nullptr};
    Scratch(arena, stack.layer[i], arguments...);
    most = larger(most, arena.used);
  }
  return most;
}

// Scratch of each of `groups` groups of threads for its part of the batch. Parts differ by a row, and the smaller one
// may need more: its blocks have more steps.
template <class Cell>
Size group_scratch(const Call& call, int groups) {
  const bool needs_gather = groups > 1 || (call.schedule.order && !call.schedule.packed),
             reads_output = !call.schedule.order && !call.schedule.resets;
  const auto scratch_for = [&](Size rows) {
    return largest_scratch<ForwardScratch<Cell>>(call.stack, call.steps, rows, needs_gather, reads_output);
  };
  return larger(scratch_for(call.batch / groups), scratch_for((call.batch + groups - 1) / groups));
}

template <class Cell>
Size forward_scratch(const Forward& call) {
  Arena arena{nullptr};
  for (int i = 0; i < buffers_of(call); ++i) arena.take(between_layers(call));
  const int groups = groups_for(call.threads, call);
  // The system may start fewer threads than it was asked for; these make one group.
  return arena.used + larger(groups * group_scratch<Cell>(call, groups), group_scratch<Cell>(call, 1));
}

template <class Cell>
Size backward_scratch(const Backward& call) {
  Arena arena{nullptr};
  for (int i = 0; i < buffers_of(call); ++i) arena.take(between_layers(call));
  return arena.used + largest_scratch<BackwardScratch<Cell>>(call.stack, call);
}

// Applies dropout to some rows of a sequence [T, B, units], or to a packed one. Each thread does some steps. Once the
// call is asked to end, the remaining steps are left out.
inline void drop_rows(const Call& call, Size layer, Team::Share rows, Size units, const Real* from, Real* to,
                      const Team& team) {
  constexpr Size operations_of_draw = 16;
  const Team::Share share = team.share(call.steps);
  const Schedule& schedule = call.schedule;
  const Size every = larger(1, look_operations / larger(1, operations_of_draw * rows.count() * units));
  for (Size t = share.begin; t < share.end; ++t) {
    if ((t - share.begin) % every == every - 1 && team.is_asked_to_end(call.interrupt)) return;
    const Size first = schedule.packed ? schedule.rows_before[t] : t * call.batch;
    const Size end = schedule.packed ? schedule.active[t] : rows.end;
    for (Size b = rows.begin; b < end; ++b)
      drop_row(call.dropout, layer, b, t, units, from + (first + b) * units, to + (first + b) * units);
  }
}

// The elements of an array beginning with `first`; null if the array is null.
template <class Pointer>
auto offset_or_null(Pointer* array, Size first) {
  using Typed = std::conditional_t<std::is_const_v<Pointer>, const Real, Real>;
  return array ? static_cast<Typed*>(array) + first : nullptr;
}

// What a layer reads: the caller's input, or the buffer between it and the layer below.
inline Rows<const Real*> input_rows(const Call& call, Size layer, const Real* between) {
  if (layer == 0) return {static_cast<const Real*>(call.input.data), call.input.step, call.input.row};
  return rows_of<const Real*>(const_cast<Real*>(between), call.batch,
                              call.stack.layer[layer * call.stack.directions].input);
}
// What a layer writes, or has written: the caller's output, or the buffer between it and the layer above.
template <class Pointer>
Rows<Real*> output_rows(const Call& call, Rows<Pointer> output, Size layer, Real* between) {
  const Stack& stack = call.stack;
  if (layer + 1 == stack.layers)
    return {const_cast<Real*>(static_cast<const Real*>(output.data)), output.step, output.row};
  return rows_of<Real*>(between, call.batch, stack.directions * output_of(*stack.layer));
}

// One direction of a layer, over some rows of the batch.
inline Sequence sequence_of(const Call& call, Size layer, Size direction, Team::Share rows, Rows<const Real*> input,
                            Rows<Real*> output, const SequenceTape& tape) {
  const Size index = layer * call.stack.directions + direction;
  const Size recurrent = output_of(call.stack.layer[index]);
  return {
      .layer = call.stack.layer[index],
      .steps = call.steps,
      .batch = rows.count(),
      .first = rows.begin,
      .full_batch = call.batch,
      .reverse = direction == 1,
      .schedule = call.schedule,
      .input = input,
      .output = {output.data + direction * recurrent, output.step, output.row},
      .hidden_before = offset_or_null(call.hidden_before, index * call.batch * recurrent),
      .tape = tape,
      .interrupt = call.interrupt,
  };
}

// The gradients of one direction of a layer.
inline SequenceGradients gradients_of(const Backward& call, Size layer, Size direction, Rows<const Real*> grad_output,
                                      Rows<Real*> grad_input) {
  const Size index = layer * call.stack.directions + direction;
  const Size recurrent = output_of(call.stack.layer[index]);
  const Size first_hidden = index * call.batch * recurrent, first_cell = index * call.batch * call.stack.layer->hidden;
  return {
      .output = {grad_output.data ? grad_output.data + direction * recurrent : nullptr, grad_output.step,
                 grad_output.row},
      .hidden_after = offset_or_null(call.grad_hidden_after, first_hidden),
      .cell_after = offset_or_null(call.grad_cell_after, first_cell),
      .input = grad_input,
      .add_to_input = direction == 1,
      .hidden_before = offset_or_null(call.grad_hidden_before, first_hidden),
      .cell_before = offset_or_null(call.grad_cell_before, first_cell),
      .parameters = call.gradients + index,
  };
}

inline Status status_of(const Call& call) { return is_asked(call.interrupt) ? Status::interrupted : Status::complete; }

template <class Cell>
Status run_forward(const Forward& call) {
  const Stack& stack = call.stack;
  const Size batch = call.batch, directions = stack.directions;
  Arena arena{static_cast<Real*>(call.scratch)};
  Real* buffers[2] = {};
  for (int i = 0; i < buffers_of(call); ++i) buffers[i] = arena.take(between_layers(call));
  Real* scratch = arena.base + arena.used;

  run_team(call.threads, [&](const Team& all_threads) {
    const int groups = all_threads.size == call.threads ? groups_for(all_threads.size, call) : 1;
    const int rank = all_threads.group_rank(groups);
    const Team team = all_threads.group(groups);
    const Team::Share rows = Team::part(batch, rank, groups);
    // Not computed for the first group, since it would slow down small steps.
    Real* group_memory = rank > 0 ? scratch + rank * group_scratch<Cell>(call, groups) : scratch;
    const Real* below = nullptr;
    for (Size layer = 0; layer < stack.layers; ++layer) {
      const Size recurrent = output_of(*stack.layer), hidden = stack.layer->hidden;
      LayerTape<Cell> tape{};
      if (call.tape) tape = LayerTape<Cell>::find(call, layer);
      Real* between = call.tape ? tape.output : buffers[layer % 2];
      for (Size d = 0; d < directions; ++d) {
        const Size states = (layer * directions + d) * batch;
        Sequence sequence = sequence_of(call, layer, d, rows, input_rows(call, layer, below),
                                        output_rows(call, call.output, layer, between), tape.direction[d]);
        if (layer == 0 && call.lookup.rows) {
          sequence.table_rows = call.lookup.rows;
          sequence.table = static_cast<const Real*>(call.lookup.sums[d]);
        }
        if (!forward_steps<Cell>(sequence, offset_or_null(call.cell_before, states * hidden),
                                 offset_or_null(call.hidden_after, states * recurrent),
                                 offset_or_null(call.cell_after, states * hidden), group_memory, team))
          return;
      }
      if (layer + 1 == stack.layers) break;
      team.wait();
      below = between;
      if (drops(call)) {
        drop_rows(call, layer, rows, directions * recurrent, tape.output, buffers[0], team);
        if (!team.goes_on(call.interrupt)) return;
        below = buffers[0];
      }
    }
  });
  return status_of(call);
}

template <class Cell>
Status run_backward(const Backward& call) {
  const Stack& stack = call.stack;
  const Size batch = call.batch, directions = stack.directions;
  Arena arena{static_cast<Real*>(call.scratch)};
  Real* buffers[3] = {};
  for (int i = 0; i < buffers_of(call); ++i) buffers[i] = arena.take(between_layers(call));
  Real* scratch = arena.base + arena.used;

  run_team(call.threads, [&](const Team& team) {
    Rows<const Real*> grad_output{static_cast<const Real*>(call.grad_output.data), call.grad_output.step,
                                  call.grad_output.row};
    for (Size layer = stack.layers - 1; layer >= 0; --layer) {
      const Size below = stack.layer[layer * directions].input;
      const LayerTape<Cell> tape = LayerTape<Cell>::find(call, layer);
      const Real* input = layer > 0 ? LayerTape<Cell>::find(call, layer - 1).output : nullptr;
      if (layer > 0 && drops(call)) {
        drop_rows(call, layer - 1, {0, batch}, below, input, buffers[2], team);
        if (!team.goes_on(call.interrupt)) return;
        input = buffers[2];
      }
      const Rows<Real*> grad_input =
          layer == 0 ? Rows<Real*>{static_cast<Real*>(call.grad_input.data), call.grad_input.step, call.grad_input.row}
                     : rows_of<Real*>(buffers[layer % 2], batch, below);
      for (Size d = 0; d < directions; ++d) {
        const SequenceGradients grads = gradients_of(call, layer, d, grad_output, grad_input);
        if (!backward_steps<Cell>(sequence_of(call, layer, d, {0, batch}, input_rows(call, layer, input),
                                              output_rows(call, call.output, layer, tape.output), tape.direction[d]),
                                  call, grads, scratch, team))
          return;
        team.wait();
      }
      if (layer == 0) break;
      if (drops(call)) {
        drop_rows(call, layer - 1, {0, batch}, below, grad_input.data, grad_input.data, team);
        if (!team.goes_on(call.interrupt)) return;
      }
      grad_output = {grad_input.data, grad_input.step, grad_input.row};
    }
  });
  return status_of(call);
}

// Copies what one layer and direction kept out of the panels of the tape, to rows [T][B][units] of each value.
template <class Cell>
void run_trace(const Backward& call, const Trace& trace) {
  const LayerTape<Cell> tape = LayerTape<Cell>::find(call, trace.layer);
  const Sequence sequence =
      sequence_of(call, trace.layer, trace.direction, {0, call.batch}, {},
                  output_rows(call, call.output, trace.layer, tape.output), tape.direction[trace.direction]);
  const Size hidden = sequence.layer.hidden, recurrent = output_of(sequence.layer);
  for (Size i = 0; i < sequence.steps; ++i) {
    const StepTape step = sequence.step_tape(Cell(), {sequence.tape.kept, sequence.tape.carried, 0}, i, 0);
    for (Size b = 0; b < sequence.batch; ++b) {
      const Size at = sequence.time(i), row = at * sequence.batch + sequence.row(b);
      copy(sequence.step_of(sequence.output, at) + sequence.row(b) * sequence.output.row,
           static_cast<Real*>(trace.hidden) + row * recurrent, recurrent);
      const auto value = [&](void* to, Size panel, Register from) {
        store_first(from, static_cast<Real*>(to) + row * hidden + panel * lanes, units_in(panel, hidden));
      };
      for (Size panel = 0; panel < panels_of(hidden); ++panel) {
        const Size tape_offset = (panel * step.rows + b) * lanes;
        Register kept[Cell::kept], before = Register::broadcast(0);
        const bool active = b < sequence.active(i);
        if (active && Cell::carried) before = Register::load(step.carried + tape_offset);
        repeat<Cell::kept>([&](int n) GATEWISE_LAMBDA {
          kept[n] = active ? Register::load(step.kept + tape_offset * Cell::kept + n * lanes) : Register::broadcast(0);
          value(trace.kept[n], panel, kept[n]);
        });
        if (trace.carried) value(trace.carried, panel, Cell::after(kept, before));
      }
    }
  }
}

}  // namespace gatewise::GATEWISE_KERNEL
