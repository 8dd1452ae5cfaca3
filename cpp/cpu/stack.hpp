// Layers on layers, in one or both directions: one call, one team of threads, no allocation in between.
#pragma once

#include "dropout.hpp"
#include "sequence.hpp"

namespace gatewise::GATEWISE_KERNEL {

template <class Pointer>
Rows<Pointer> rows_of(Real* data, Size batch, Size units) {
  return {data, batch * units, units};
}

// What a recorded layer keeps, beside the output that the caller has of the last one.
template <class Cell>
struct LayerTape {
  SequenceTape direction[2];
  Real* output = nullptr;   // [T, B, D*R]; the last layer: none
  Real* dropped = nullptr;  // the same after dropout; without dropout the output itself

  LayerTape() = default;
  LayerTape(Arena& arena, const Stack& stack, Size layer, Size steps, Size batch, bool dropout) {
    const Layer* first = stack.layer + layer * stack.directions;
    for (Size d = 0; d < stack.directions; ++d) direction[d] = SequenceTape(arena, Cell(), first[d], steps, batch);
    const Size size = layer + 1 < stack.layers ? steps * batch * stack.directions * output_of(*first) : 0;
    output = arena.take(size);
    dropped = dropout ? arena.take(size) : output;
  }

  // Of the given layer in a tape at `base`.
  static LayerTape find(Real* base, const Stack& stack, Size layer, Size steps, Size batch, bool dropout) {
    Arena arena{base};
    for (Size below = 0; below < layer; ++below) LayerTape(arena, stack, below, steps, batch, dropout);
    return LayerTape(arena, stack, layer, steps, batch, dropout);
  }
};

template <class Cell>
Size tape_size(const Stack& stack, Size steps, Size batch, bool dropout) {
  Arena arena{nullptr};
  for (Size layer = 0; layer < stack.layers; ++layer) LayerTape<Cell>(arena, stack, layer, steps, batch, dropout);
  return arena.used;
}

// Elements between two layers, [T, B, D*R], of which forward in inference and backward need two at a time.
inline Size between_layers(const Stack& stack, Size steps, Size batch) {
  return stack.layers > 1 ? steps * batch * stack.directions * output_of(*stack.layer) : 0;
}

template <class Scratch, class... Options>
Size largest_scratch(const Stack& stack, Size steps, Size batch, Options... options) {
  Size most = 0;
  for (Size i = 0; i < stack.layers * stack.directions; ++i) {
    Arena arena{nullptr};
    Scratch(arena, stack.layer[i], steps, batch, options...);
    most = larger(most, arena.used);
  }
  return most;
}

// What each of `groups` groups of threads needs for its part of the batch. Parts differ by a row, and the one with
// fewer may take more steps ahead.
template <class Cell>
Size group_scratch(const Stack& stack, Size steps, Size batch, int groups) {
  const auto of_rows = [&](Size rows) { return largest_scratch<ForwardScratch<Cell>>(stack, steps, rows, groups > 1); };
  return larger(of_rows(batch / groups), of_rows((batch + groups - 1) / groups));
}

template <class Cell>
Size forward_scratch(const Stack& stack, Size steps, Size batch, bool record, int threads) {
  Arena arena{nullptr};
  for (int i = 0; i < 2 && !record; ++i) arena.take(between_layers(stack, steps, batch));
  const int groups = groups_for(threads, batch, stack.layer->hidden);
  // The system may give fewer threads than it was asked for; these make one group.
  return arena.used +
         larger(groups * group_scratch<Cell>(stack, steps, batch, groups), group_scratch<Cell>(stack, steps, batch, 1));
}

template <class Cell>
Size backward_scratch(const Stack& stack, Size steps, Size batch) {
  Arena arena{nullptr};
  for (int i = 0; i < 2; ++i) arena.take(between_layers(stack, steps, batch));
  return arena.used + largest_scratch<BackwardScratch<Cell>>(stack, steps, batch);
}

// Dropout over some rows of a whole sequence [T, B, units], cut over the team by steps.
inline void drop_rows(const Dropout& dropout, Size layer, Size steps, Size batch, Team::Share rows, Size units,
                      const Real* from, Real* to, const Team& team) {
  const Team::Share own = team.share(steps);
  for (Size t = own.begin; t < own.end; ++t)
    for (Size b = rows.begin; b < rows.end; ++b)
      drop_row(dropout, layer, b, t, units, from + (t * batch + b) * units, to + (t * batch + b) * units);
}

// The elements from the given one on, or null where there are none.
template <class Pointer>
auto from(Pointer* array, Size first) {
  using Typed = std::conditional_t<std::is_const_v<Pointer>, const Real, Real>;
  return array ? static_cast<Typed*>(array) + first : nullptr;
}

template <class Cell>
void run_forward(const Forward& call) {
  const Stack& stack = call.stack;
  const Size batch = call.batch, directions = stack.directions;
  const Size steps = batch ? call.steps : 0;  // without rows there is nothing to walk through
  const bool dropout = call.tape && call.dropout.probability > 0;
  Arena arena{static_cast<Real*>(call.scratch)};
  Real* buffers[2] = {};
  for (int i = 0; i < 2 && !call.tape; ++i) buffers[i] = arena.take(between_layers(stack, steps, batch));
  Real* scratch = arena.base + arena.used;

  run_team(call.threads, [&](const Team& everyone) {
    const int groups = everyone.size == call.threads ? groups_for(everyone.size, batch, stack.layer->hidden) : 1;
    const int rank = everyone.group_rank(groups);
    const Team team = everyone.group(groups);
    const Team::Share rows = Team::part(batch, rank, groups);
    Real* own_scratch = scratch + rank * group_scratch<Cell>(stack, steps, batch, groups);
    Rows<const Real*> input{static_cast<const Real*>(call.input.data), call.input.step, call.input.row};
    for (Size layer = 0; layer < stack.layers; ++layer) {
      const Layer* of_direction = stack.layer + layer * directions;
      const Size recurrent = output_of(*of_direction), units = directions * recurrent;
      const bool last = layer + 1 == stack.layers;
      LayerTape<Cell> tape{};
      if (call.tape) tape = LayerTape<Cell>::find(static_cast<Real*>(call.tape), stack, layer, steps, batch, dropout);
      Real* between = call.tape ? tape.output : buffers[layer % 2];
      const Rows<Real*> output =
          last ? Rows<Real*>{static_cast<Real*>(call.output.data), call.output.step, call.output.row}
               : rows_of<Real*>(between, batch, units);
      for (Size d = 0; d < directions; ++d) {
        const Size index = layer * directions + d, hidden = of_direction[d].hidden;
        const Size of_hidden = (index * batch + rows.begin) * recurrent,
                   of_cell = (index * batch + rows.begin) * hidden;
        const Sequence sequence{of_direction[d],
                                steps,
                                rows.count(),
                                groups > 1,
                                d == 1,
                                {input.data + rows.begin * input.row, input.step, input.row},
                                {output.data + rows.begin * output.row + d * recurrent, output.step, output.row},
                                from(call.hidden_before, of_hidden),
                                tape.direction[d].from_row(Cell(), rows.begin)};
        const auto walk = call.tape ? forward_steps<Cell, true> : forward_steps<Cell, false>;
        walk(sequence, from(call.cell_before, of_cell), from(call.hidden_after, of_hidden),
             from(call.cell_after, of_cell), own_scratch, team);
      }
      if (last) break;
      team.wait();
      input = rows_of<const Real*>(between, batch, units);
      if (dropout) {
        drop_rows(call.dropout, layer, steps, batch, rows, units, tape.output, tape.dropped, team);
        team.wait();
        input.data = tape.dropped;
      }
    }
  });
}

template <class Cell>
void run_backward(const Backward& call) {
  const Stack& stack = call.stack;
  const Size batch = call.batch, directions = stack.directions;
  const Size steps = batch ? call.steps : 0;  // without rows there is nothing to walk through
  const bool dropout = call.dropout.probability > 0;
  Arena arena{static_cast<Real*>(call.scratch)};
  Real* buffers[2];
  for (Real*& buffer : buffers) buffer = arena.take(between_layers(stack, steps, batch));
  Real* scratch = arena.base + arena.used;
  Real* tape_base = const_cast<Real*>(static_cast<const Real*>(call.tape));

  run_team(call.threads, [&](const Team& team) {
    Rows<const Real*> grad_output{static_cast<const Real*>(call.grad_output.data), call.grad_output.step,
                                  call.grad_output.row};
    for (Size layer = stack.layers - 1; layer >= 0; --layer) {
      const Layer* of_direction = stack.layer + layer * directions;
      const Size recurrent = output_of(*of_direction), units = directions * recurrent, below = of_direction->input;
      const auto tape_of = [&](Size l) { return LayerTape<Cell>::find(tape_base, stack, l, steps, batch, dropout); };
      const LayerTape<Cell> tape = tape_of(layer);
      const bool last = layer + 1 == stack.layers;
      const Rows<const Real*> output =
          last ? Rows<const Real*>{static_cast<const Real*>(call.output.data), call.output.step, call.output.row}
               : rows_of<const Real*>(tape.output, batch, units);
      const Rows<const Real*> input =
          layer == 0 ? Rows<const Real*>{static_cast<const Real*>(call.input.data), call.input.step, call.input.row}
                     : rows_of<const Real*>(tape_of(layer - 1).dropped, batch, below);
      const Rows<Real*> grad_input =
          layer == 0 ? Rows<Real*>{static_cast<Real*>(call.grad_input.data), call.grad_input.step, call.grad_input.row}
                     : rows_of<Real*>(buffers[layer % 2], batch, below);
      for (Size d = 0; d < directions; ++d) {
        const Size index = layer * directions + d, hidden = of_direction[d].hidden;
        const Size of_hidden = index * batch * recurrent, of_cell = index * batch * hidden;
        const Sequence sequence{of_direction[d],
                                steps,
                                batch,
                                false,
                                d == 1,
                                input,
                                {const_cast<Real*>(output.data) + d * recurrent, output.step, output.row},
                                from(call.hidden_before, of_hidden),
                                tape.direction[d]};
        const SequenceGradients grads{
            {grad_output.data ? grad_output.data + d * recurrent : nullptr, grad_output.step, grad_output.row},
            from(call.grad_hidden_after, of_hidden),
            from(call.grad_cell_after, of_cell),
            grad_input,
            d == 1,
            from(call.grad_hidden_before, of_hidden),
            from(call.grad_cell_before, of_cell),
            call.gradients + index};
        backward_steps<Cell>(sequence, grads, scratch, team);
        team.wait();
      }
      if (layer == 0) break;
      if (dropout) {
        drop_rows(call.dropout, layer - 1, steps, batch, {0, batch}, below, grad_input.data, grad_input.data, team);
        team.wait();
      }
      grad_output = {grad_input.data, grad_input.step, grad_input.row};
    }
  });
}

}  // namespace gatewise::GATEWISE_KERNEL
