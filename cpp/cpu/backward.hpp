// Backward through time (BPTT), one layer and direction.
#pragma once

#include "forward.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Gradients of the gate sums are collected in blocks of steps, from the last step to the first, before they are
// multiplied for the gradients of weights and input. A block has as many rows as one chain of a weight's gradient, so
// that its order of additions, too, never depends on threads, padding or checkpoints. Rows within a block are in the
// order of BPTT: from the last step to the first.
inline Size block_rows(const Call& call) {
  if (call.schedule.rows_before && call.steps > 0)  // only rows that take the step
    return smaller(call.schedule.rows_before[call.steps], larger(chain_length, call.schedule.active[0]));
  const Size batch = larger(1, call.batch);
  return smaller(larger(1, call.steps), larger(1, chain_length / batch)) * call.batch;
}

template <class Cell>
struct BackwardScratch {
  Size rows;                    // of a block
  Real* hidden_transposed;      // [panel of R][panel of H][gate][lane][lane of R]
  Real* input_transposed;       // [panel of I][panel of H][gate][lane][lane of I]
  Real* projection_transposed;  // [panel of H][panel of P][lane][lane of H]
  Panels<Cell> gradients;
  Real* grad_sums;         // [panel of H][rows][sum][lane]
  Real* grad_hidden;       // [panel of R][B][lane]
  Real* grad_carried;      // [panel of H][B][lane]
  Real* grad_input;        // [panel of I][rows][lane]
  Real* grad_projected;    // [panel of P][rows][lane]
  Real* grad_cell_hidden;  // [panel of H][B][lane]
  Real* cell_hidden;       // [rows][H], h before the projection
  Real* zeros;             // [R]
  Size transposed_row;     // at least `rows`
  Real* input_columns;     // [I][transposed_row], hidden_columns [R][transposed_row]: see transpose_rows
  Real* hidden_columns;
  // With checkpoints: recomputes the steps after one, with what a tape of everything keeps of them, and their state.
  RowsScratch<Cell> replayed;
  StepTape replay_tape;  // of all rows of these steps, in the order of time
  Real* replay_state;    // [panel of H][B][lane]

  BackwardScratch(Arena& arena, const Layer& layer, const Call& call)
      : rows(block_rows(call)),
        hidden_transposed(arena.take(panels_of(output_of(layer)) * depth(layer) * lanes)),
        input_transposed(arena.take(panels_of(layer.input) * depth(layer) * lanes)),
        projection_transposed(arena.take(panels_of(layer.hidden) * panels_of(layer.projection) * lanes * lanes)),
        gradients(arena, layer),
        replayed(arena, layer, call.steps, call.checkpoint_every ? call.batch : 0, call.schedule.order, true) {
    const Size panels = panels_of(layer.hidden), batch = call.batch, state = panels * batch * lanes;
    grad_sums = arena.take(panels * rows * Cell::sums * lanes);
    grad_hidden = arena.take(panels_of(output_of(layer)) * batch * lanes);
    grad_carried = arena.take(state);
    grad_input = arena.take(panels_of(layer.input) * rows * lanes);
    grad_projected = arena.take(panels_of(layer.projection) * rows * lanes);
    grad_cell_hidden = arena.take(layer.projection ? state : 0);
    cell_hidden = arena.take(layer.projection ? rows * layer.hidden : 0);
    zeros = arena.take(output_of(layer));
    transposed_row =
        (panels_of(rows) + 1) * lanes;  // one more, since rows a power of two apart would share a cache's sets
    input_columns = arena.take(panels_of(layer.input) * lanes * transposed_row);
    hidden_columns = arena.take(panels_of(output_of(layer)) * lanes * transposed_row);
    // The first steps have the most rows.
    const Size most = smaller(call.steps, call.checkpoint_every),
               replay_rows = call.schedule.rows_before ? call.schedule.rows_before[most] : most * batch;
    replay_tape.kept = arena.take(replay_rows * panels * lanes * Cell::kept);
    replay_tape.carried = arena.take(replay_rows * panels * lanes);
    replay_state = arena.take(most ? state : 0);
  }

  static Size depth(const Layer& layer) { return panels_of(layer.hidden) * Cell::gates * lanes; }
};

struct SequenceGradients {
  Rows<const Real*> output;     // [T, B, R]; null: zero
  const Real* hidden_after;     // [B, R]; null: zero
  const Real* cell_after;       // [B, H]; null: zero
  Rows<Real*> input;            // [T, B, I]; null: not wanted
  bool add_to_input;            // to what another direction has written there
  Real* hidden_before;          // [B, R]
  Real* cell_before;            // [B, H]; null: none
  const Gradients* parameters;  // without weight_ih: not wanted
};

// Steps [first, end) of the recurrence, whose rows follow each other in the order of BPTT.
struct Block {
  Size first, end, rows;

  // The first row of the i-th step.
  static Size row(const Sequence& sequence, Size i, Size end) {
    const Size last = sequence.time(end - 1);
    return sequence.reverse ? sequence.rows_between(last, sequence.time(i))
                            : sequence.rows_between(sequence.time(i) + 1, last + 1);
  }
  Block(const Sequence& sequence, Size end, Size most)
      : first(end - sequence.steps_within(end - 1, -1, end, most)), end(end), rows(row(sequence, first - 1, end)) {}
};

// Computes the gradients of the sums, and of the carried state before a step, from those of h and of the carried state
// after it. grad_hidden [panel][B][lane] came through the hidden product of the next step; grad_output, the step's rows
// [B][R], is added to it. grad_sums [panel][rows][sum][lane], a panel `sums_panel` apart.
template <class Cell>
[[gnu::noinline]] void update_backward(const Sequence& sequence, Team::Share share, Size rows, StepTape tape,
                                       Real* grad_hidden, Rows<const Real*> grad_output, Real* grad_carried,
                                       Real* grad_sums, Size sums_panel, Real* cell_hidden) {
  const Size units = sequence.layer.hidden;
  for (Size panel = share.begin; panel < share.end; ++panel) {
    Real* grad_sum = grad_sums + panel * sums_panel;
    const Size count = units_in(panel, units);
    Size state = panel * sequence.batch * lanes, tape_offset = panel * tape.rows * lanes;
    for (Size b = 0; b < rows; ++b, grad_sum += Cell::sums * lanes, state += lanes, tape_offset += lanes) {
      Register kept[Cell::kept], before{}, unit_grad_carried{}, unit_grad_sums[Cell::sums], grad_before{};
      repeat<Cell::kept>(
          [&](int i) GATEWISE_LAMBDA { kept[i] = Register::load(tape.kept + tape_offset * Cell::kept + i * lanes); });
      if constexpr (Cell::carried) before = Register::load(tape.carried + tape_offset);
      if constexpr (Cell::carried) unit_grad_carried = Register::load(grad_carried + state);
      const Register after = Cell::after(kept, before);
      Register unit_grad_hidden = Register::load(grad_hidden + state);
      if constexpr (Cell::carries_hidden) unit_grad_hidden = unit_grad_hidden + unit_grad_carried;
      if (grad_output.data) {
        const Real* const grad = grad_output.data + sequence.row(b) * grad_output.row + panel * lanes;
        __builtin_prefetch(grad + lanes);  // the next panel's: too many rows for a processor's own prefetching
        unit_grad_hidden = unit_grad_hidden + load_first(grad, count);
      }
      Cell::backward(kept, before, after, unit_grad_hidden, unit_grad_carried, unit_grad_sums, grad_before);
      repeat<Cell::sums>([&](int i) GATEWISE_LAMBDA {
        // An infinity would become NaN in lanes without a unit, and must not spread from there.
        only_first(unit_grad_sums[i], count).store(grad_sum + i * lanes);
      });
      if constexpr (Cell::carried) grad_before.store(grad_carried + state);
      if (cell_hidden)
        store_first(Cell::hidden(typename Cell::Standard(), kept, after), cell_hidden + b * units + panel * lanes,
                    count);
    }
  }
}

// Transposes the rows that the steps of a block read, x or h before each step: [unit][row]. The products for the
// gradients of weights read columns of these rows many times; rows a power of two apart would share a few places of the
// L1 (H 512, B 16: 20 % of the products' time). The next rows are prefetched meanwhile (half of the time of
// this function).
template <class RowAt>
void transpose_rows(const Sequence& sequence, const Block& block, Size units, Team::Share share, const RowAt& row_at,
                    Real* columns, Size transposed_row) {
  Size i = block.end - 1, b = 0;
  const auto find_rows = [&](Size row, const Real*(&rows)[lanes]) {
    const Size count = larger(0, smaller(lanes, block.rows - row));
    for (Size lane = 0; lane < count; ++lane) {
      rows[lane] = row_at(i, b);
      if (++b == sequence.active(i)) {
        b = 0;
        --i;
      }
    }
    return count;
  };
  const Real *from[lanes], *next[lanes];
  Size rows = find_rows(0, from);
  for (Size row = 0; row < block.rows; row += lanes) {
    const Size next_rows = find_rows(row + lanes, next);
    for (Size panel = share.begin; panel < share.end; ++panel) {
      for (Size lane = 0; lane < next_rows; ++lane) __builtin_prefetch(next[lane] + panel * lanes, 0, 2);
      const auto column_at = [&](Size lane) GATEWISE_LAMBDA { return from[lane] + panel * lanes; };
      const Square square(column_at, rows, units_in(panel, units));
      for (Size unit = 0; unit < lanes; ++unit)
        square.row[unit].store(columns + (panel * lanes + unit) * transposed_row + row);
    }
    for (Size lane = 0; lane < next_rows; ++lane) from[lane] = next[lane];
    rows = next_rows;
  }
}

// Adds the products of a block's rows with the gradients of its sums to the gradients of the weights. Each is a chain
// from the last step to the first, and in each step from the first row to the last.
template <class Cell>
void accumulate_gradients(const Sequence& sequence, const BackwardScratch<Cell>& s, const Block& block,
                          const Team& team) {
  constexpr int G = Cell::gates;
  const Layer& layer = sequence.layer;
  const Team::Share hidden_share = team.share(panels_of(layer.hidden)),
                    projection_share = team.share(panels_of(layer.projection));
  const Size sums_row = Cell::sums * lanes, sums_panel = s.rows * sums_row;
  // Adds the products of rows [size][block.rows], whose units and rows lie `unit` and `row` apart, with gradients of
  // sums.
  const auto add = [&](auto gates, const Real* rows, Size unit, Size row, Size size, const Real* grads,
                       Size grads_panel, Size grads_row, Team::Share share, Real* sums) {
    constexpr int width = decltype(gates)::value;
    Product product{
        .rows = size,
        .panels = share.count(),
        .run = block.rows,
        .scalars = {.data = rows, .row = unit, .step = row},
        .vectors = {.data = grads + share.begin * grads_panel, .panel = grads_panel, .step = grads_row},
        .sums = {.data = sums + share.begin * size * width * lanes,
                 .panel = size * width * lanes,
                 .row = width * lanes},
    };
    if (block.end < sequence.steps) product.start = product.sums.as_start();
    multiply_interruptibly<width>(product, team, sequence.interrupt);
  };
  using Gates = std::integral_constant<int, G>;
  add(Gates(), s.input_columns, s.transposed_row, 1, layer.input, s.grad_sums + Cell::first_input_sum * lanes,
      sums_panel, sums_row, hidden_share, s.gradients.input);
  add(Gates(), s.hidden_columns, s.transposed_row, 1, output_of(layer), s.grad_sums + Cell::first_hidden_sum * lanes,
      sums_panel, sums_row, hidden_share, s.gradients.hidden);
  if (layer.projection)
    add(std::integral_constant<int, 1>(), s.cell_hidden, 1, layer.hidden, layer.hidden, s.grad_projected,
        s.rows * lanes, lanes, projection_share, s.gradients.projection);

  // A bias is a weight of an input that is always one.
  const Real one = 1;
  add(std::integral_constant<int, Cell::sums>(), &one, 0, 0, 1, s.grad_sums, sums_panel, sums_row, hidden_share,
      s.gradients.bias);
}

// The product of grad_sums, beginning with row 0, and transposed weights: [panel of k][row][lane], where k are the
// inputs or the hidden units.
template <class Cell>
Product product_of_gradients(const Layer& layer, const BackwardScratch<Cell>& s, int first_sum, const Real* transposed,
                             Team::Share share) {
  const Size depth = BackwardScratch<Cell>::depth(layer), sums_row = Cell::sums * lanes;
  return {
      .panels = share.count(),
      .segments = panels_of(layer.hidden),
      .run = Cell::gates * lanes,
      .scalars = {.data = s.grad_sums + first_sum * lanes, .row = sums_row, .segment = s.rows * sums_row},
      .vectors = {.data = transposed + share.begin * depth * lanes,
                  .panel = depth * lanes,
                  .step = lanes,
                  .segment = Cell::gates * lanes * lanes},
  };
}

// Writes the gradients of the input of a block, in the columns of `share`; zero after the end of a row.
template <class Cell>
void input_gradients(const Sequence& sequence, const SequenceGradients& grads, const BackwardScratch<Cell>& s,
                     const Block& block, Team::Share share, const Team& team) {
  const Size panel_size = s.rows * lanes, units = sequence.layer.input;
  Product product = product_of_gradients(sequence.layer, s, Cell::first_input_sum, s.input_transposed, share);
  product.rows = block.rows;
  product.sums = {.data = s.grad_input + share.begin * panel_size, .panel = panel_size, .row = lanes};
  const auto grad_row = [&](Size i, Size b) {
    return sequence.step_of(grads.input, sequence.time(i)) + sequence.row(b) * grads.input.row;
  };
  const auto each = [&](const auto& body) {
    for (Size panel = share.begin; panel < share.end; ++panel) {
      Real* sums = s.grad_input + panel * panel_size;
      for (Size i = block.end - 1; i >= block.first; --i)
        for (Size b = 0; b < sequence.active(i); ++b, sums += lanes)
          body(sums, grad_row(i, b) + panel * lanes, units_in(panel, units));
    }
  };
  if (grads.add_to_input) {
    each([](Real* sums, const Real* row, Size count) { load_first(row, count).store(sums); });
    product.start = product.sums.as_start();
  }
  multiply_interruptibly<1>(product, team, sequence.interrupt);
  each([](const Real* sums, Real* row, Size count) { store_first(Register::load(sums), row, count); });
  const Team::Share columns = units_of(share, units);
  for (Size i = block.first; i < block.end && !grads.add_to_input; ++i)
    for (Size b = sequence.active(i), last = b + sequence.rows_to_clear(i); b < last; ++b)
      clear(grad_row(i, b) + columns.begin, columns.count());
}

// Transposes the weights, and loads the gradients that come from after the last step.
template <class Cell>
GATEWISE_INLINE void prepare_backward(const Sequence& sequence, const SequenceGradients& grads,
                                      const Panels<Cell>& packed, const BackwardScratch<Cell>& s, const Shares& shares,
                                      Team::Share input_share, bool replays, const Team& team) {
  constexpr int G = Cell::gates;
  const Layer& layer = sequence.layer;
  const Size hidden = layer.hidden, recurrent = output_of(layer);
  if (!sequence.hidden_before || sequence.schedule.resets) {
    clear(s.zeros + shares.recurrent_units.begin, shares.recurrent_units.count());
    if (replays) team.wait();  // replayed steps read columns of other threads
  }
  transpose(packed.hidden, hidden, recurrent, G, shares.recurrent, s.hidden_transposed);
  if (grads.input.data) transpose(packed.input, hidden, layer.input, G, input_share, s.input_transposed);
  if (layer.projection)
    transpose(packed.projection, layer.projection, hidden, 1, shares.hidden, s.projection_transposed);
  if (sequence.steps == 0) {
    const auto clear_panels = [](Real* values, Size size, Team::Share share) {
      clear(values + share.begin * size, share.count() * size);
    };
    clear_panels(s.gradients.input, layer.input * G * lanes, shares.hidden);
    clear_panels(s.gradients.hidden, recurrent * G * lanes, shares.hidden);
    clear_panels(s.gradients.bias, Cell::sums * lanes, shares.hidden);
    clear_panels(s.gradients.projection, hidden * lanes, shares.projection);
  }
  load_state(sequence, grads.hidden_after, recurrent, shares.recurrent, s.grad_hidden);
  if constexpr (Cell::carried) load_state(sequence, grads.cell_after, hidden, shares.hidden, s.grad_carried);
}

// With checkpoints: the steps [first, end) that have been recomputed, and the rows of the checkpoints before them.
struct Replay {
  Size first, end, earlier_rows;
};

// Recomputes the steps from the checkpoint before the i-th step on, up to those that have been recomputed already.
// Returns false if it was interrupted.
template <class Cell>
GATEWISE_INLINE bool replay_before(const Sequence& sequence, const Panels<Cell>& packed, const BackwardScratch<Cell>& s,
                                   Size i, Team::Share share, Replay& replay, const Team& team) {
  const Size every = sequence.tape.checkpoint_every;
  replay.end = replay.first;
  replay.first = i / every * every;
  const Size rows = sequence.checkpoint_rows(replay.first);
  replay.earlier_rows -= rows;
  for (Size panel = share.begin; panel < share.end && Cell::carried; ++panel)
    copy(sequence.checkpoint(replay.earlier_rows) + panel * rows * lanes,
         s.replay_state + panel * sequence.batch * lanes, rows * lanes);
  return replay_steps(sequence, packed, replay.first, replay.end - replay.first, s.replay_state, s.replayed, s.zeros,
                      s.replay_tape, team);
}

// Computes the gradients of the hidden units before the projection, s.grad_cell_hidden, from those of h. grad_output:
// the step's rows, or null data; row: the step's first row in its block.
template <class Cell>
GATEWISE_INLINE void project_gradients(const Sequence& sequence, const BackwardScratch<Cell>& s, const Shares& shares,
                                       Size rows, Size row, Rows<const Real*> grad_output, const Team& team) {
  const Size batch = sequence.batch, recurrent = sequence.layer.projection;
  for (Size panel = shares.projection.begin; panel < shares.projection.end; ++panel)
    for (Size b = 0; b < rows; ++b) {
      const Size count = units_in(panel, recurrent);
      Register grad = Register::load(s.grad_hidden + (panel * batch + b) * lanes);
      if (grad_output.data)
        grad = grad + load_first(grad_output.data + sequence.row(b) * grad_output.row + panel * lanes, count);
      only_first(grad, count).store(s.grad_projected + (panel * s.rows + row + b) * lanes);
    }
  team.wait();
  const Size segments = panels_of(recurrent), panel = segments * lanes * lanes;
  multiply<1>({
      .rows = rows,
      .panels = shares.hidden.count(),
      .segments = segments,
      .run = lanes,
      .scalars = {.data = s.grad_projected + row * lanes, .row = lanes, .segment = s.rows * lanes},
      .vectors = {.data = s.projection_transposed + shares.hidden.begin * panel,
                  .panel = panel,
                  .step = lanes,
                  .segment = lanes * lanes},
      .sums = {.data = s.grad_cell_hidden + shares.hidden.begin * batch * lanes, .panel = batch * lanes, .row = lanes},
  });
}

// Transposes the rows that the steps of a block read.
template <class Cell>
GATEWISE_INLINE void transpose_block(const Sequence& sequence, const Block& block, const BackwardScratch<Cell>& s,
                                     Team::Share input_share, Team::Share recurrent_share) {
  transpose_rows(
      sequence, block, sequence.layer.input, input_share, [&](Size i, Size b) { return sequence.input_row(i, b); },
      s.input_columns, s.transposed_row);
  transpose_rows(
      sequence, block, output_of(sequence.layer), recurrent_share,
      [&](Size i, Size b) { return sequence.hidden_row(i, b, s.zeros); }, s.hidden_columns, s.transposed_row);
}

// Computes the gradients of h before a step, s.grad_hidden, from those of its sums, which begin at `row` of the block.
template <class Cell>
GATEWISE_INLINE void hidden_gradients(const Sequence& sequence, const BackwardScratch<Cell>& s, Team::Share share,
                                      Size i, Size rows, Size row) {
  const Size panel = sequence.batch * lanes;
  Product product = product_of_gradients(sequence.layer, s, Cell::first_hidden_sum, s.hidden_transposed, share);
  product.rows = rows;
  product.descending = is_descending(i);
  product.scalars.data += row * Cell::sums * lanes;
  product.sums = {.data = s.grad_hidden + share.begin * panel, .panel = panel, .row = lanes};
  multiply<1>(product);
}

// Writes the gradients of the state before the first step, and those of the weights if they are wanted.
template <class Cell>
GATEWISE_INLINE void store_gradients(const Sequence& sequence, const SequenceGradients& grads,
                                     const BackwardScratch<Cell>& s, const Shares& shares) {
  const Layer& layer = sequence.layer;
  if constexpr (Cell::carries_hidden) {
    const Size panel = sequence.batch * lanes;
    for (Size i = shares.hidden.begin * panel; i < shares.hidden.end * panel; i += lanes)
      (Register::load(s.grad_hidden + i) + Register::load(s.grad_carried + i)).store(s.grad_hidden + i);
  }
  store_state(sequence, s.grad_hidden, output_of(layer), shares.recurrent, grads.hidden_before);
  if (grads.cell_before) store_state(sequence, s.grad_carried, layer.hidden, shares.hidden, grads.cell_before);
  if (grads.parameters->weight_ih)
    unpack_gradients(layer, s.gradients, *grads.parameters, shares.hidden, shares.projection);
}

// Goes back through all steps. Returns false if it was interrupted; the gradients are then undefined.
template <class Cell>
bool backward_steps(const Sequence& sequence, const Call& call, const SequenceGradients& grads, Real* scratch,
                    const Team& team) {
  const Layer& layer = sequence.layer;
  const Size steps = sequence.steps, hidden = layer.hidden, every = call.checkpoint_every;
  const Shares shares(layer, team);
  const Team::Share input_share = team.share(panels_of(layer.input));
  Arena arena{scratch};
  const Panels<Cell> packed = packed_panels<Cell>(layer);
  const BackwardScratch<Cell> s(arena, layer, call);
  const Size sums_row = Cell::sums * lanes, sums_panel = s.rows * sums_row;
  const bool wants_input = grads.input.data, wants_parameters = grads.parameters->weight_ih;
  prepare_backward(sequence, grads, packed, s, shares, input_share, every > 0, team);

  Replay replay{steps, steps, sequence.tape.rows};
  InterruptCountdown countdown = sequence.countdown();
  for (Size end = steps; end > 0;) {
    const Block block(sequence, end, s.rows);
    if (wants_parameters) transpose_block(sequence, block, s, input_share, shares.recurrent);
    for (Size i = end - 1; i >= block.first; --i) {
      const Size rows = sequence.active(i), row = Block::row(sequence, i, end);
      if (every > 0 && i < replay.first && !replay_before(sequence, packed, s, i, shares.hidden, replay, team))
        return false;
      const StepTape tape = every > 0
                                ? sequence.step_tape(Cell(), s.replay_tape, i,
                                                     sequence.lowest_time(replay.first, replay.end - replay.first))
                                : sequence.step_tape(Cell(), {sequence.tape.kept, sequence.tape.carried, 0}, i, 0);
      Rows<const Real*> grad_output = grads.output;
      if (grad_output.data) grad_output.data = sequence.step_of(grad_output, sequence.time(i));
      if (layer.projection) {
        project_gradients(sequence, s, shares, rows, row, grad_output, team);
        grad_output.data = nullptr;
      }
      update_backward<Cell>(sequence, shares.hidden, rows, tape, layer.projection ? s.grad_cell_hidden : s.grad_hidden,
                            grad_output, s.grad_carried, s.grad_sums + row * sums_row, sums_panel,
                            layer.projection ? s.cell_hidden + row * hidden : nullptr);
      if (!countdown.wait(team, sequence.interrupt)) return false;
      hidden_gradients(sequence, s, shares.recurrent, i, rows, row);
      // Through a reset before the step, no gradient comes to the steps before.
      reset_panels(sequence, i, shares.recurrent, s.grad_hidden);
      if (Cell::carried) reset_panels(sequence, i, shares.hidden, s.grad_carried);
    }
    if (wants_parameters) accumulate_gradients(sequence, s, block, team);
    if (wants_input) input_gradients(sequence, grads, s, block, input_share, team);
    if (!team.goes_on(sequence.interrupt)) return false;
    end = block.first;
  }

  store_gradients(sequence, grads, s, shares);
  return true;
}

}  // namespace gatewise::GATEWISE_KERNEL
