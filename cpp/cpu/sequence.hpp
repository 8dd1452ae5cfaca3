// One layer in one direction through time: forward, and backward through time (BPTT).
//
// Everything between two products lies in panels, [panel][row][value][lane], so that each thread owns whole panels of
// everything and the elementwise work of a unit happens where its sums were made. Rows of the batch, [row][unit], are
// what products read as scalars: the input, and h.
//
// Threads share panels; they meet once a step, when h (forward) or the gradients of the sums (backward) are complete.
#pragma once

#include "packing.hpp"
#include "threads.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Sums of the input products that are made ahead of the recurrence: what stays in the second cache meanwhile, or, where
// that is only a few rows, as many rows as make one passage over the weights pay. (H 650, B 20: 5 % faster.)
constexpr Size ahead_bytes = 128 * 1024;
constexpr Size ahead_rows = 96;
// Sums of some panels between their product and the cell: what stays in the first cache.
constexpr Size group_bytes = 8 * 1024;
// Backward collects the gradients of sums over some steps, counted from the last one, before it multiplies with them:
// just as many as make one chain of the gradients of the weights, so that these, too, have one order of additions.
constexpr Size gradient_steps(Size batch) { return larger(1, chain_length / larger(1, batch)); }

// Every second step goes through the weights from the last panel to the first: it begins with those that are still in
// the cache. (One row: 8 % faster for H 64, whose weights fit half into the first cache, and as much for H 256 and the
// second; many rows: no difference.)
inline bool turns_back(Size step) { return step % 2 == 1; }

// Forward, threads are cut into groups, each with rows of the batch to itself: as many as have rows_alone of them.
inline int groups_for(int threads, Size batch, Size hidden) {
  const Size most = smaller(most_groups, larger(1, batch / rows_alone(hidden)));
  int groups = threads;
  while (groups > most || threads % groups != 0) --groups;
  return groups;
}

// What a recorded sequence keeps.
struct SequenceTape {
  Real* kept = nullptr;     // [T][panel][B][kept][lane]
  Real* carried = nullptr;  // [T + 1][panel][B][lane], in the order of the recurrence: the state before step i at i
  Size rows = 0;            // B, of which a sequence may have a part

  SequenceTape() = default;
  template <class Cell>
  SequenceTape(Arena& arena, Cell, const Layer& layer, Size steps, Size batch) {
    const Size values = panels_of(layer.hidden) * batch * lanes;
    kept = arena.take(steps * values * Cell::kept);
    carried = Cell::carried ? arena.take((steps + 1) * values) : nullptr;
    rows = batch;
  }

  // Of the rows from the given one on.
  template <class Cell>
  SequenceTape from_row(Cell, Size row) const {
    SequenceTape part = *this;
    if (kept) part.kept += row * Cell::kept * lanes;
    if (carried) part.carried += row * lanes;
    return part;
  }
};

struct Sequence {
  Layer layer;
  Size steps, batch;
  bool part;  // of a batch of more rows, so that those of one step do not follow on those of the step before
  bool reverse;
  Rows<const Real*> input;    // [T, B, I]
  Rows<Real*> output;         // [T, B, R]
  const Real* hidden_before;  // [B, R]; null: zero
  SequenceTape tape;          // null: nothing is kept

  // The i-th step of the recurrence.
  Size time(Size i) const { return reverse ? steps - 1 - i : i; }
  // The lowest of the times of the steps i ... i + count - 1.
  Size lowest_time(Size i, Size count) const { return reverse ? steps - i - count : i; }
};

// The rows [B][units] of one step.
struct BatchRows {
  const Real* data;
  Size row;
};
// h before the i-th step.
inline BatchRows hidden_before(const Sequence& sequence, Size i, const Real* zeros) {
  if (i > 0) return {sequence.output.data + sequence.time(i - 1) * sequence.output.step, sequence.output.row};
  if (sequence.hidden_before) return {sequence.hidden_before, output_of(sequence.layer)};
  return {zeros, 0};
}

inline void clear(Real* values, Size count) {
  for (Size i = 0; i < count; ++i) values[i] = 0;
}

// Columns of the panels in `share` between rows [B][units] and panels [panel][rows][lane], of which the first B are
// meant; null rows are zero.
inline void load_panels(const Real* from, Size stride, Size units, Size batch, Team::Share share, Real* panels,
                        Size rows) {
  for (Size panel = share.begin; panel < share.end; ++panel)
    for (Size b = 0; b < batch; ++b)
      (from ? load_first(from + b * stride + panel * lanes, units_in(panel, units)) : Register::broadcast(0))
          .store(panels + (panel * rows + b) * lanes);
}
inline void store_panels(const Real* panels, Size rows, Size units, Size batch, Team::Share share, Real* to,
                         Size stride) {
  for (Size panel = share.begin; panel < share.end; ++panel)
    for (Size b = 0; b < batch; ++b)
      store_first(Register::load(panels + (panel * rows + b) * lanes), to + b * stride + panel * lanes,
                  units_in(panel, units));
}

// The rows of `times` steps brought together, as [times * B][units].
inline void gather_rows(Rows<const Real*> from, Size times, Size batch, Size units, Real* to) {
  for (Size t = 0; t < times; ++t)
    for (Size b = 0; b < batch; ++b, to += units) {
      const Real* row = from.data + t * from.step + b * from.row;
      for (Size i = 0; i < units; ++i) to[i] = row[i];
    }
}

// The product with one set of rows, over all times at once where rows follow each other at one stride.
template <int G, class T>
void multiply_times(Product product, Rows<T> rows, Size times, Size batch) {
  product.scalars.row = batch == 1 ? rows.step : rows.row;
  if (batch == 1 || rows.step == batch * rows.row) {
    product.rows = times * batch;
    return multiply<G>(product);
  }
  product.rows = batch;
  for (Size t = 0; t < times; ++t) {
    multiply<G>(product);
    product.scalars.data += rows.step;
    product.sums.data += batch * product.sums.row;
    if (product.start.data) product.start.data += batch * product.start.row;
  }
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class Cell>
struct ForwardScratch {
  Size steps_ahead;
  Real* sums;         // [panel of H][steps_ahead * B][sum][lane]
  Real* carried;      // [panel of H][B][lane]
  Real* zeros;        // [R]
  Real* cell_hidden;  // [B][H], h before the projection
  Real* projected;    // [panel of P][B][lane]
  Real* input;        // [steps_ahead * B][I], where rows of a part of the batch are brought together

  ForwardScratch(Arena& arena, const Layer& layer, Size steps, Size batch, bool part) {
    const Size panels = panels_of(layer.hidden), row = panels * Cell::sums * lanes;
    const Size fitting = ahead_bytes / Size(sizeof(Real)) / larger(1, batch * row),
               enough = ahead_rows / larger(1, batch);
    steps_ahead = larger(1, smaller(steps, larger(fitting, enough)));
    sums = arena.take(steps_ahead * batch * row);
    carried = arena.take(panels * batch * lanes);
    zeros = arena.take(output_of(layer));
    cell_hidden = arena.take(layer.projection ? batch * layer.hidden : 0);
    projected = arena.take(panels_of(layer.projection) * batch * lanes);
    input = arena.take(part ? steps_ahead * batch * layer.input : 0);
  }
};

// Sums of the panels in `share` become the state after the step, the output, and what the tape keeps.
// sums [panel][B][sum][lane], a panel `panel_stride` apart; before, after [panel][state_rows][lane]; out [B][H].
//
// The hidden unit of one row is finished while the next row is at its gates: LSTM's tanh(c) waits for all of them, and
// a processor looks ahead less than two rows (2.35 ns a unit instead of 3.0 on Zen 3).
template <class Cell, bool record>
[[gnu::noinline]] void update(Team::Share share, Size units, Size batch, const Real* sums, Size panel_stride,
                              const Real* before, Real* after, Size state_rows, Real* kept, Real* out, Size out_row) {
  if (batch == 0) return;
  Register kept_of[Cell::kept], after_of{};
  Real* out_of = nullptr;
  Size count_of = 0;
  const auto finish = [&]() GATEWISE_LAMBDA { store_first(Cell::hidden(kept_of, after_of), out_of, count_of); };
  for (Size panel = share.begin; panel < share.end; ++panel) {
    const Real* sum = sums + panel * panel_stride;
    for (Size b = 0; b < batch; ++b, sum += Cell::sums * lanes) {
      const Size place = (panel * state_rows + b) * lanes;
      Register sum_of[Cell::sums], before_of{}, next_kept[Cell::kept], next_after{};
      repeat<Cell::sums>([&](int i) GATEWISE_LAMBDA { sum_of[i] = Register::load(sum + i * lanes); });
      if constexpr (Cell::carried) before_of = Register::load(before + place);
      Cell::forward(sum_of, before_of, next_after, next_kept);
      if constexpr (Cell::carried) next_after.store(after + place);
      if constexpr (record)
        repeat<Cell::kept>([&](int i) GATEWISE_LAMBDA { next_kept[i].store(kept + place * Cell::kept + i * lanes); });
      if (out_of) finish();
      repeat<Cell::kept>([&](int i) GATEWISE_LAMBDA { kept_of[i] = next_kept[i]; });
      after_of = next_after;
      out_of = out + b * out_row + panel * lanes;
      count_of = units_in(panel, units);
    }
  }
  if (out_of) finish();
}

template <class Cell, bool record>
void forward_steps(const Sequence& sequence, const Real* cell_before, Real* hidden_after, Real* cell_after,
                   Real* scratch, const Team& team) {
  constexpr int G = Cell::gates;
  const Layer& layer = sequence.layer;
  const Size steps = sequence.steps, batch = sequence.batch, hidden = layer.hidden, recurrent = output_of(layer);
  const Size state_rows = record ? sequence.tape.rows : batch;
  const Size panels = panels_of(hidden), state = panels * state_rows * lanes;
  const Team::Share own = team.share(panels), own_projection = team.share(panels_of(layer.projection));
  Arena packed_arena{const_cast<Real*>(static_cast<const Real*>(layer.packed))}, arena{scratch};
  const Panels<Cell> packed(packed_arena, layer);
  const ForwardScratch<Cell> s(arena, layer, steps, batch, sequence.part);
  const Size sums_row = Cell::sums * lanes, sums_panel = s.steps_ahead * batch * sums_row;
  if (!sequence.hidden_before) clear(s.zeros, recurrent);  // by each thread: the same zeros

  Real* carried = record ? sequence.tape.carried : s.carried;
  if constexpr (Cell::carried) {
    const Real* before = Cell::carries_hidden ? sequence.hidden_before : cell_before;
    load_panels(before, hidden, hidden, batch, own, carried, state_rows);
  }

  const Size group_values = group_bytes / Size(sizeof(Real)), panel_values = larger(1, batch * sums_row);
  const Size group = panels * panel_values <= group_values ? panels : larger(1, group_values / panel_values);
  for (Size ahead = 0; ahead < steps; ahead += s.steps_ahead) {
    const Size count = smaller(s.steps_ahead, steps - ahead), lowest = sequence.lowest_time(ahead, count);
    Rows<const Real*> input{sequence.input.data + lowest * sequence.input.step, sequence.input.step,
                            sequence.input.row};
    if (sequence.part) {
      if (team.rank == 0) gather_rows(input, count, batch, layer.input, s.input);
      input = {s.input, batch * layer.input, layer.input};
      team.wait();
    }
    Product inputs{};
    inputs.panels = own.count();
    inputs.segments = 1;
    inputs.run = layer.input;
    inputs.scalars = {input.data, 0, 1, 0};
    inputs.vectors = {packed.input + own.begin * layer.input * G * lanes, layer.input * G * lanes, G * lanes, 0};
    inputs.start = {packed.bias + own.begin * sums_row, sums_row, 0};
    inputs.sums = {s.sums + own.begin * sums_panel, sums_panel, sums_row};
    multiply_times<G>(inputs, input, count, batch);
    // The sums that no input feeds start from their bias.
    for (Size panel = own.begin; panel < own.end && Cell::sums > G; ++panel)
      for (Size row = 0; row < count * batch; ++row)
        repeat<Cell::sums - G>([&](int i) GATEWISE_LAMBDA {
          Register::load(packed.bias + panel * sums_row + (G + i) * lanes)
              .store(s.sums + panel * sums_panel + row * sums_row + (G + i) * lanes);
        });

    for (Size i = ahead; i < ahead + count; ++i) {
      const Size time = sequence.time(i);
      const BatchRows before = hidden_before(sequence, i, s.zeros);
      Real* sums = s.sums + (time - lowest) * batch * sums_row;
      Real* output = sequence.output.data + time * sequence.output.step;
      Real* after = record && Cell::carried ? carried + state : carried;
      const bool descending = turns_back(i);
      for (Size done = 0; done < own.count(); done += group) {
        const Size width = smaller(group, own.count() - done),
                   panel = descending ? own.end - done - width : own.begin + done;
        const Team::Share share{panel, panel + width};
        Product product{};
        product.descending = descending;
        product.rows = batch;
        product.panels = share.count();
        product.segments = 1;
        product.run = recurrent;
        product.scalars = {before.data, before.row, 1, 0};
        product.vectors = {packed.hidden + panel * recurrent * G * lanes, recurrent * G * lanes, G * lanes, 0};
        product.sums = {sums + panel * sums_panel + Cell::first_hidden_sum * lanes, sums_panel, sums_row};
        product.start = {product.sums.data, sums_panel, sums_row};
        multiply<G>(product);
        update<Cell, record>(share, hidden, batch, sums, sums_panel, carried, after, state_rows,
                             record ? sequence.tape.kept + i * state * Cell::kept : nullptr,
                             layer.projection ? s.cell_hidden : output,
                             layer.projection ? hidden : sequence.output.row);
      }
      carried = after;
      team.wait();
      if (layer.projection) {
        Product product{};
        product.rows = batch;
        product.panels = own_projection.count();
        product.segments = 1;
        product.run = hidden;
        product.scalars = {s.cell_hidden, hidden, 1, 0};
        product.vectors = {packed.projection + own_projection.begin * hidden * lanes, hidden * lanes, lanes, 0};
        product.sums = {s.projected + own_projection.begin * batch * lanes, batch * lanes, lanes};
        multiply<1>(product);
        store_panels(s.projected, batch, layer.projection, batch, own_projection, output, sequence.output.row);
        team.wait();
      }
    }
  }

  const BatchRows last = hidden_before(sequence, steps, s.zeros);
  const Team::Share own_hidden = layer.projection ? own_projection : own;
  const Size begin = own_hidden.begin * lanes, end = smaller(own_hidden.end * lanes, recurrent);
  for (Size b = 0; b < batch; ++b)
    for (Size unit = begin; unit < end; ++unit) hidden_after[b * recurrent + unit] = last.data[b * last.row + unit];
  if (cell_after) store_panels(carried, state_rows, hidden, batch, own, cell_after, hidden);
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class Cell>
struct BackwardScratch {
  Size block_steps;
  Real* hidden_turned;      // [panel of R][panel of H][gate][lane][lane of R]
  Real* input_turned;       // [panel of I][panel of H][gate][lane][lane of I]
  Real* projection_turned;  // [panel of H][panel of P][lane][lane of H]
  Panels<Cell> gradients;
  Real* grad_sums;         // [panel of H][block_steps * B][sum][lane]
  Real* grad_hidden;       // [panel of R][B][lane]
  Real* grad_carried;      // [panel of H][B][lane]
  Real* grad_input;        // [panel of I][block_steps * B][lane]
  Real* grad_projected;    // [panel of P][block_steps * B][lane]
  Real* grad_cell_hidden;  // [panel of H][B][lane]
  Real* cell_hidden;       // [block_steps * B][H], h before the projection
  Real* zeros;             // [R]
  Size turned_row;         // at least block_steps * B
  Real* turned_input;      // [I][turned_row], turned_hidden [R][turned_row]: see turn_rows
  Real* turned_hidden;

  BackwardScratch(Arena& arena, const Layer& layer, Size steps, Size batch)
      : block_steps(smaller(larger(1, steps), gradient_steps(batch))),
        hidden_turned(arena.take(panels_of(output_of(layer)) * depth(layer) * lanes)),
        input_turned(arena.take(panels_of(layer.input) * depth(layer) * lanes)),
        projection_turned(arena.take(panels_of(layer.hidden) * panels_of(layer.projection) * lanes * lanes)),
        gradients(arena, layer) {
    const Size panels = panels_of(layer.hidden), rows = block_steps * batch;
    grad_sums = arena.take(panels * rows * Cell::sums * lanes);
    grad_hidden = arena.take(panels_of(output_of(layer)) * batch * lanes);
    grad_carried = arena.take(panels * batch * lanes);
    grad_input = arena.take(panels_of(layer.input) * rows * lanes);
    grad_projected = arena.take(panels_of(layer.projection) * rows * lanes);
    grad_cell_hidden = arena.take(layer.projection ? panels * batch * lanes : 0);
    cell_hidden = arena.take(layer.projection ? rows * layer.hidden : 0);
    zeros = arena.take(output_of(layer));
    turned_row = (panels_of(rows) + 1) * lanes;  // one more: no power of two, whose rows would share a cache's sets
    turned_input = arena.take(panels_of(layer.input) * lanes * turned_row);
    turned_hidden = arena.take(panels_of(output_of(layer)) * lanes * turned_row);
  }

  static Size depth(const Layer& layer) { return panels_of(layer.hidden) * Cell::gates * lanes; }
};

struct SequenceGradients {
  Rows<const Real*> output;  // [T, B, R]; null: zero
  const Real* hidden_after;  // [B, R]; null: zero
  const Real* cell_after;    // [B, H]; null: zero
  Rows<Real*> input;         // [T, B, I]
  bool add_to_input;         // to what another direction has written there
  Real* hidden_before;       // [B, R]
  Real* cell_before;         // [B, H]; null: none
  const Gradients* parameters;
};

// The gradients of h and of the carried state after a step become those of the sums and of the carried state before it.
// grad_hidden [panel][B][lane] is what came through the hidden product of the next step, grad_output [B][R] comes on
// top.
template <class Cell>
[[gnu::noinline]] void update_backward(Team::Share share, Size units, Size batch, const Real* kept, const Real* before,
                                       const Real* after, Real* grad_hidden, const Real* grad_output,
                                       Size grad_output_row, Real* grad_carried, Real* grad_sums, Size panel_stride,
                                       Real* cell_hidden) {
  for (Size panel = share.begin; panel < share.end; ++panel) {
    Real* grad_sum = grad_sums + panel * panel_stride;
    const Size count = units_in(panel, units);
    for (Size b = 0; b < batch; ++b, grad_sum += Cell::sums * lanes) {
      const Size place = (panel * batch + b) * lanes;
      Register kept_of[Cell::kept], before_of{}, after_of{}, grad_carried_of{}, grad_sum_of[Cell::sums], grad_before{};
      repeat<Cell::kept>([&](int i)
                             GATEWISE_LAMBDA { kept_of[i] = Register::load(kept + place * Cell::kept + i * lanes); });
      if constexpr (Cell::carried) before_of = Register::load(before + place), after_of = Register::load(after + place);
      if constexpr (Cell::carried) grad_carried_of = Register::load(grad_carried + place);
      Register grad_hidden_of = Register::load(grad_hidden + place);
      if constexpr (Cell::carries_hidden) grad_hidden_of = grad_hidden_of + grad_carried_of;
      if (grad_output)
        grad_hidden_of = grad_hidden_of + load_first(grad_output + b * grad_output_row + panel * lanes, count);
      Cell::backward(kept_of, before_of, after_of, grad_hidden_of, grad_carried_of, grad_sum_of, grad_before);
      repeat<Cell::sums>([&](int i) GATEWISE_LAMBDA {
        // Lanes without a unit must not pass on an infinity's NaN.
        only_first(grad_sum_of[i], count).store(grad_sum + i * lanes);
      });
      if constexpr (Cell::carried) grad_before.store(grad_carried + place);
      if (cell_hidden) store_first(Cell::hidden(kept_of, after_of), cell_hidden + b * units + panel * lanes, count);
    }
  }
}

// The rows that a block of steps read, x or h before each step, turned over: [unit][row] in the order of BPTT, from the
// last step to the first. The gradients of weights walk through rows, many times; where these lie a power of two apart
// they would share a few places of the first cache (H 512, B 16: 20 % of the products' time).
template <class RowsAt>
void turn_rows(const RowsAt& rows_at, Size last, Size count, Size batch, Size units, Team::Share share, Real* turned,
               Size turned_row) {
  for (Size row = 0; row < count * batch; row += lanes) {
    const Size rows = smaller(lanes, count * batch - row);
    const Real* from[lanes];
    for (Size i = 0; i < rows; ++i) {
      const BatchRows of_step = rows_at(last - (row + i) / batch);
      from[i] = of_step.data + (row + i) % batch * of_step.row;
    }
    for (Size panel = share.begin; panel < share.end; ++panel) {
      const auto row_at = [&](Size i) GATEWISE_LAMBDA { return from[i] + panel * lanes; };
      const Square square(row_at, rows, units_in(panel, units));
      for (Size i = 0; i < lanes; ++i) square.row[i].store(turned + (panel * lanes + i) * turned_row + row);
    }
  }
}

// The products of one block of steps [first, first + count) of the recurrence with the gradients of its sums: into
// the gradients of the weights, each a chain from the last step to the first and from the first row to the last.
template <class Cell>
void accumulate_gradients(const Sequence& sequence, const BackwardScratch<Cell>& s, Size first, Size count,
                          const Team& team) {
  constexpr int G = Cell::gates;
  const Layer& layer = sequence.layer;
  const Size batch = sequence.batch, hidden = layer.hidden;
  const Team::Share own = team.share(panels_of(hidden)), own_projection = team.share(panels_of(layer.projection));
  const Size sums_row = Cell::sums * lanes, sums_panel = s.block_steps * batch * sums_row;
  const Size last = first + count - 1, lowest = sequence.lowest_time(first, count);
  const Size backward = sequence.reverse ? 1 : -1;  // the way of BPTT through time
  // The rows of `size` units, `row` apart from step to step and `unit` from unit to unit, against gradients of sums.
  const auto add = [&](auto gates, const Real* rows, Size unit, Size row, Size step, Size size, const Real* grads,
                       Size grads_panel, Size grads_row, Team::Share share, Real* sums) {
    constexpr int width = decltype(gates)::value;
    Product product{};
    product.rows = size;
    product.panels = share.count();
    product.segments = count;
    product.run = batch;
    product.scalars = {rows, unit, row, step};
    product.vectors = {grads + share.begin * grads_panel + (sequence.time(last) - lowest) * batch * grads_row,
                       grads_panel, grads_row, backward * batch * grads_row};
    product.sums = {sums + share.begin * size * width * lanes, size * width * lanes, width * lanes};
    if (last + 1 < sequence.steps) product.start = {product.sums.data, product.sums.panel, product.sums.row};
    multiply<width>(product);
  };
  using Gates = std::integral_constant<int, G>;
  add(Gates(), s.turned_input, s.turned_row, 1, batch, layer.input, s.grad_sums + Cell::first_input_sum * lanes,
      sums_panel, sums_row, own, s.gradients.input);
  add(Gates(), s.turned_hidden, s.turned_row, 1, batch, output_of(layer), s.grad_sums + Cell::first_hidden_sum * lanes,
      sums_panel, sums_row, own, s.gradients.hidden);
  if (layer.projection)
    add(std::integral_constant<int, 1>(), s.cell_hidden + (sequence.time(last) - lowest) * batch * hidden, 1, hidden,
        backward * batch * hidden, hidden, s.grad_projected, s.block_steps * batch * lanes, lanes, own_projection,
        s.gradients.projection);

  // A bias is a weight of an input that is always one.
  const Real one = 1;
  add(std::integral_constant<int, Cell::sums>(), &one, 0, 0, 0, 1, s.grad_sums, sums_panel, sums_row, own,
      s.gradients.bias);
}

// grad_sums from row 0 on times turned weights: [panel of k][row][lane], k the inputs or the hidden units.
template <class Cell>
Product product_of_gradients(const Layer& layer, const BackwardScratch<Cell>& s, Size batch, int first_sum,
                             const Real* turned, Team::Share share) {
  const Size depth = BackwardScratch<Cell>::depth(layer), sums_row = Cell::sums * lanes;
  Product product{};
  product.panels = share.count();
  product.segments = panels_of(layer.hidden);
  product.run = Cell::gates * lanes;
  product.scalars = {s.grad_sums + first_sum * lanes, sums_row, 1, s.block_steps * batch * sums_row};
  product.vectors = {turned + share.begin * depth * lanes, depth * lanes, lanes, Cell::gates * lanes * lanes};
  return product;
}

template <class Cell>
void backward_steps(const Sequence& sequence, const SequenceGradients& grads, Real* scratch, const Team& team) {
  constexpr int G = Cell::gates;
  const Layer& layer = sequence.layer;
  const Size steps = sequence.steps, batch = sequence.batch, hidden = layer.hidden, recurrent = output_of(layer);
  const Size panels = panels_of(hidden), state = panels * batch * lanes;
  const Team::Share own = team.share(panels), own_hidden = team.share(panels_of(recurrent));
  const Team::Share own_input = team.share(panels_of(layer.input)),
                    own_projection = team.share(panels_of(layer.projection));
  Arena packed_arena{const_cast<Real*>(static_cast<const Real*>(layer.packed))}, arena{scratch};
  const Panels<Cell> packed(packed_arena, layer);
  const BackwardScratch<Cell> s(arena, layer, steps, batch);
  const Size sums_row = Cell::sums * lanes, sums_panel = s.block_steps * batch * sums_row;

  if (!sequence.hidden_before) clear(s.zeros, recurrent);  // by each thread: the same zeros
  transpose(packed.hidden, hidden, recurrent, G, own_hidden, s.hidden_turned);
  transpose(packed.input, hidden, layer.input, G, own_input, s.input_turned);
  if (layer.projection) transpose(packed.projection, layer.projection, hidden, 1, own, s.projection_turned);
  if (steps == 0) {
    const auto clear_panels = [](Real* panels_from, Size size, Team::Share share) {
      clear(panels_from + share.begin * size, share.count() * size);
    };
    clear_panels(s.gradients.input, layer.input * G * lanes, own);
    clear_panels(s.gradients.hidden, recurrent * G * lanes, own);
    clear_panels(s.gradients.bias, sums_row, own);
    clear_panels(s.gradients.projection, hidden * lanes, own_projection);
  }
  load_panels(grads.hidden_after, recurrent, recurrent, batch, own_hidden, s.grad_hidden, batch);
  if constexpr (Cell::carried) load_panels(grads.cell_after, hidden, hidden, batch, own, s.grad_carried, batch);

  for (Size end = steps; end > 0;) {
    const Size count = smaller(s.block_steps, end), first = end - count, lowest = sequence.lowest_time(first, count);
    const auto input_at = [&](Size i) {
      return BatchRows{sequence.input.data + sequence.time(i) * sequence.input.step, sequence.input.row};
    };
    const auto hidden_at = [&](Size i) { return hidden_before(sequence, i, s.zeros); };
    turn_rows(input_at, end - 1, count, batch, layer.input, own_input, s.turned_input, s.turned_row);
    turn_rows(hidden_at, end - 1, count, batch, recurrent, own_hidden, s.turned_hidden, s.turned_row);
    for (Size i = end - 1; i >= first; --i) {
      const Size time = sequence.time(i), row = (time - lowest) * batch;
      const Real* grad_output = grads.output.data ? grads.output.data + time * grads.output.step : nullptr;
      Real* grad_cell_hidden = s.grad_hidden;
      if (layer.projection) {
        for (Size panel = own_projection.begin; panel < own_projection.end; ++panel)
          for (Size b = 0; b < batch; ++b) {
            const Size count_of = units_in(panel, recurrent);
            Register grad = Register::load(s.grad_hidden + (panel * batch + b) * lanes);
            if (grad_output) grad = grad + load_first(grad_output + b * grads.output.row + panel * lanes, count_of);
            only_first(grad, count_of).store(s.grad_projected + (panel * s.block_steps * batch + row + b) * lanes);
          }
        team.wait();
        grad_cell_hidden = s.grad_cell_hidden;
        grad_output = nullptr;
        Product product{};
        product.rows = batch;
        product.panels = own.count();
        product.segments = panels_of(recurrent);
        product.run = lanes;
        product.scalars = {s.grad_projected + row * lanes, lanes, 1, s.block_steps * batch * lanes};
        product.vectors = {s.projection_turned + own.begin * product.segments * lanes * lanes,
                           product.segments * lanes * lanes, lanes, lanes * lanes};
        product.sums = {grad_cell_hidden + own.begin * batch * lanes, batch * lanes, lanes};
        multiply<1>(product);
      }
      const Real* carried = Cell::carried ? sequence.tape.carried + i * state : nullptr;
      update_backward<Cell>(own, hidden, batch, sequence.tape.kept + i * state * Cell::kept, carried,
                            Cell::carried ? carried + state : nullptr, grad_cell_hidden, grad_output, grads.output.row,
                            s.grad_carried, s.grad_sums + row * sums_row, sums_panel,
                            layer.projection ? s.cell_hidden + row * hidden : nullptr);
      team.wait();
      Product product = product_of_gradients(layer, s, batch, Cell::first_hidden_sum, s.hidden_turned, own_hidden);
      product.rows = batch;
      product.descending = turns_back(i);
      product.scalars.data += row * sums_row;
      product.sums = {s.grad_hidden + own_hidden.begin * batch * lanes, batch * lanes, lanes};
      multiply<1>(product);
    }
    accumulate_gradients(sequence, s, first, count, team);

    Product product = product_of_gradients(layer, s, batch, Cell::first_input_sum, s.input_turned, own_input);
    const Size grad_panel = s.block_steps * batch * lanes;
    product.rows = count * batch;
    product.sums = {s.grad_input + own_input.begin * grad_panel, grad_panel, lanes};
    Real* grad_input = grads.input.data + lowest * grads.input.step;
    const auto each_row = [&](const auto& body) {
      for (Size panel = own_input.begin; panel < own_input.end; ++panel)
        for (Size t = 0; t < count; ++t)
          for (Size b = 0; b < batch; ++b)
            body(s.grad_input + panel * grad_panel + (t * batch + b) * lanes,
                 grad_input + t * grads.input.step + b * grads.input.row + panel * lanes, units_in(panel, layer.input));
    };
    if (grads.add_to_input) {
      each_row([](Real* sums, const Real* rows, Size units) { load_first(rows, units).store(sums); });
      product.start = {product.sums.data, product.sums.panel, product.sums.row};
    }
    multiply<1>(product);
    each_row([](const Real* sums, Real* rows, Size units) { store_first(Register::load(sums), rows, units); });
    team.wait();
    end = first;
  }

  if constexpr (Cell::carries_hidden)
    for (Size i = own.begin * batch * lanes; i < own.end * batch * lanes; i += lanes)
      (Register::load(s.grad_hidden + i) + Register::load(s.grad_carried + i)).store(s.grad_hidden + i);
  store_panels(s.grad_hidden, batch, recurrent, batch, own_hidden, grads.hidden_before, recurrent);
  if (grads.cell_before) store_panels(s.grad_carried, batch, hidden, batch, own, grads.cell_before, hidden);
  unpack_gradients(layer, s.gradients, *grads.parameters, own, own_projection);
}

}  // namespace gatewise::GATEWISE_KERNEL
