// Forward through time, one layer and direction.
#pragma once

#include "activate.hpp"
#include "sequence.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Input products are computed a block of steps ahead of the recurrence. A block has as many sums as fit into the second
// cache, but at least `ahead_rows` rows, so that one pass over the weights pays. (H 650, B 20: 5 % faster.)
constexpr Size ahead_bytes = 128 * 1024;
constexpr Size ahead_rows = 96;
// Sums of the panels that are multiplied before the cell works on them: what stays in L1.
constexpr Size group_bytes = 8 * 1024;

// In forward, threads are split into groups that have rows of the batch of their own, at least min_rows_per_group of
// them. Rows of different lengths are not split, since fewer and fewer of them take a step.
inline int groups_for(int threads, const Call& call) {
  const Size most = smaller(max_groups, larger(1, call.batch / min_rows_per_group(call.stack.layer->hidden)));
  int groups = call.schedule.order ? 1 : threads;
  while (groups > most || threads % groups != 0) --groups;
  return groups;
}

// The rows of the steps of one block, in the order of time.
template <class Cell>
struct RowsScratch {
  Size rows;
  Real* sums;    // [panel of H][rows][sum][lane]
  Real* input;   // [rows][I] if rows are gathered, else null
  Real* hidden;  // [rows][R] if rows are gathered, else null

  RowsScratch(Arena& arena, const Layer& layer, Size steps, Size batch, bool gathers_input, bool gathers_hidden) {
    const Size row = panels_of(layer.hidden) * Cell::sums * lanes;
    const Size fitting = ahead_bytes / Size(sizeof(Real)) / larger(1, batch * row),
               enough = ahead_rows / larger(1, batch);
    rows = larger(1, smaller(steps, larger(fitting, enough))) * batch;
    sums = arena.take(rows * row);
    input = gathers_input ? arena.take(rows * layer.input) : nullptr;
    hidden = gathers_hidden ? arena.take(rows * output_of(layer)) : nullptr;
  }
};

template <class Cell>
struct ForwardScratch {
  RowsScratch<Cell> ahead;
  Real* carried;      // [panel of H][B][lane]
  Real* zeros;        // [R]
  Real* cell_hidden;  // [B][H], h before the projection
  Real* projected;    // [panel of P][B][lane]
  Real* hidden[2];    // [B][R], h of this step and the next, if it is not read from the output
  Real* reset;        // [B][H], r * h, if the cell multiplies it

  ForwardScratch(Arena& arena, const Layer& layer, Size steps, Size batch, bool needs_gather, bool reads_output)
      : ahead(arena, layer, steps, batch, needs_gather, false) {
    carried = arena.take(panels_of(layer.hidden) * batch * lanes);
    zeros = arena.take(output_of(layer));
    cell_hidden = arena.take(layer.projection ? batch * layer.hidden : 0);
    projected = arena.take(panels_of(layer.projection) * batch * lanes);
    for (Real*& rows : hidden) rows = arena.take(reads_output ? 0 : batch * output_of(layer));
    reset = arena.take(Cell::resets_before ? batch * layer.hidden : 0);
  }
};

// Gathers the rows row_at(i, b) [units] of `count` steps, the earliest at time `lowest`. Each thread gathers some
// steps.
template <class RowAt>
void gather_rows(const Sequence& sequence, Size lowest, Size count, Size units, const RowAt& row_at, Real* to,
                 const Team& team) {
  const Team::Share share = team.share(count);
  to += sequence.rows_between(lowest, lowest + share.begin) * units;
  for (Size t = lowest + share.begin; t < lowest + share.end; ++t) {
    const Size i = sequence.time(t);  // its own inverse
    for (Size b = 0; b < sequence.active(i); ++b, to += units) copy(row_at(i, b), to, units);
  }
}

// Multiplies the rows of several times, in one product if all rows are equally far apart in memory.
template <int G>
void multiply_times(Product product, Rows<const Real*> rows, Size times, Size batch, const Team& team,
                    Interrupt* interrupt) {
  product.scalars.row = batch == 1 ? rows.step : rows.row;
  if (batch == 1 || rows.step == batch * rows.row) {
    product.rows = times * batch;
    return multiply_interruptibly<G>(product, team, interrupt);
  }
  product.rows = batch;
  for (Size t = 0; t < times; ++t) {
    multiply_interruptibly<G>(product, team, interrupt);
    product.scalars.data += rows.step;
    product.sums.data += batch * product.sums.row;
    if (product.start.data) product.start.data += batch * product.start.row;
  }
}

// Sums without an input product start from their bias.
template <class Cell>
void start_sums_without_input(const Panels<Cell>& packed, Team::Share share, Size rows, Real* sums, Size panel,
                              Size row) {
  for (Size p = share.begin; p < share.end && Cell::sums > Cell::gates; ++p)
    for (Size m = 0; m < rows; ++m)
      repeat<Cell::sums - Cell::gates>([&](int i) GATEWISE_LAMBDA {
        const Size sum = (Cell::gates + i) * lanes;
        Register::load(packed.bias + p * Cell::sums * lanes + sum).store(sums + p * panel + m * row + sum);
      });
}

// The sums that start_sums makes, as rows [row][panel][sum][lane] to look up later. The product is the same, and so are
// the bits.
template <class Cell>
void make_input_sums(const Layer& layer, Size rows, const Real* input, Size input_row, Real* sums) {
  constexpr int G = Cell::gates;
  const Panels<Cell> packed = packed_panels<Cell>(layer);
  const Size panels = panels_of(layer.hidden), panel = Cell::sums * lanes, row = panels * panel;
  multiply<G>({
      .rows = rows,
      .panels = panels,
      .run = layer.input,
      .scalars = {.data = input, .row = input_row},
      .vectors = {.data = packed.input, .panel = layer.input * G * lanes, .step = G * lanes},
      .start = {.data = packed.bias, .panel = panel},
      .sums = {.data = sums, .panel = panel, .row = row},
  });
  start_sums_without_input(packed, {0, panels}, rows, sums, panel, row);
}

template <class Cell>
void look_up_sums(const Sequence& sequence, const RowsScratch<Cell>& s, Size lowest, Size count, Team::Share share) {
  const Size row = Cell::sums * lanes, table_row = panels_of(sequence.layer.hidden) * row, panel = s.rows * row;
  Real* to = s.sums;
  for (Size t = lowest; t < lowest + count; ++t)
    for (Size b = 0; b < sequence.active(sequence.time(t)); ++b, to += row) {  // time() is its own inverse
      const Real* from = sequence.table + sequence.table_rows[t * sequence.full_batch + sequence.row(b)] * table_row;
      for (Size p = share.begin; p < share.end; ++p) copy(from + p * row, to + p * panel, row);
    }
}

// Starts the sums [panel][rows][sum][lane] of the panels in `share` with bias and input product, for `count` steps, the
// earliest at time `lowest`.
template <class Cell>
void start_sums(const Sequence& sequence, const Panels<Cell>& packed, const RowsScratch<Cell>& s, Size lowest,
                Size count, Team::Share share, const Team& team) {
  constexpr int G = Cell::gates;
  const Size inputs = sequence.layer.input, row = Cell::sums * lanes, panel = s.rows * row;
  const Size rows = sequence.rows_between(lowest, lowest + count);
  if (sequence.table_rows) return look_up_sums<Cell>(sequence, s, lowest, count, share);
  Product product{
      .panels = share.count(),
      .run = inputs,
      .vectors = {.data = packed.input + share.begin * inputs * G * lanes,
                  .panel = inputs * G * lanes,
                  .step = G * lanes},
      .start = {.data = packed.bias + share.begin * row, .panel = row},
      .sums = {.data = s.sums + share.begin * panel, .panel = panel, .row = row},
  };
  if (s.input) {
    gather_rows(
        sequence, lowest, count, inputs, [&](Size i, Size b) { return sequence.input_row(i, b); }, s.input, team);
    team.wait();
    product.rows = rows;
    product.scalars = {.data = s.input, .row = inputs};
    multiply_interruptibly<G>(product, team, sequence.interrupt);
  } else if (sequence.schedule.packed) {
    product.rows = rows;
    product.scalars = {.data = sequence.step_of(sequence.input, lowest), .row = sequence.input.row};
    multiply_interruptibly<G>(product, team, sequence.interrupt);
  } else {
    const Rows<const Real*> input{sequence.step_of(sequence.input, lowest), sequence.input.step, sequence.input.row};
    product.scalars = {.data = input.data};
    multiply_times<G>(product, input, count, sequence.batch, team, sequence.interrupt);
  }
  start_sums_without_input(packed, share, rows, s.sums, panel, row);
}

// The product with h that is added to the sums of the panels in `share`: for all gates, or for G gates beginning with
// `first`.
template <class Cell, int G = Cell::gates, int first = 0>
Product product_with_hidden(const Layer& layer, const Panels<Cell>& packed, BatchRows hidden, Size rows,
                            bool descending, Team::Share share, Real* sums, Size sums_panel) {
  const Size recurrent = output_of(layer), row = Cell::sums * lanes, step = Cell::gates * lanes;
  const Sums added{.data = sums + share.begin * sums_panel + (Cell::first_hidden_sum + first) * lanes,
                   .panel = sums_panel,
                   .row = row};
  return {
      .rows = rows,
      .panels = share.count(),
      .run = recurrent,
      .scalars = {.data = hidden.data, .row = hidden.row},
      .vectors = {.data = packed.hidden + share.begin * recurrent * step + first * lanes,
                  .panel = recurrent * step,
                  .step = step},
      .start = added.as_start(),
      .sums = added,
      .descending = descending,
  };
}

// Adds the products of a cell that multiplies r * h for its last gate, after r of all units is known.
// carried [panel][carried_rows][lane], h before the step; reset [B][H].
template <class Cell>
void add_reset_hidden(const Layer& layer, const Panels<Cell>& packed, BatchRows hidden, Size rows, bool descending,
                      Team::Share share, Real* sums, Size sums_panel, const Real* carried, Size carried_rows,
                      Real* reset, const Team& team) {
  multiply<Cell::gates - 1>(
      product_with_hidden<Cell, Cell::gates - 1>(layer, packed, hidden, rows, descending, share, sums, sums_panel));
  const auto reset_rows = [&](const auto& functions) {
    for (Size panel = share.begin; panel < share.end; ++panel)
      for (Size b = 0; b < rows; ++b)
        store_first(Cell::reset(functions, Register::load(sums + panel * sums_panel + b * Cell::sums * lanes),
                                Register::load(carried + (panel * carried_rows + b) * lanes)),
                    reset + b * layer.hidden + panel * lanes, units_in(panel, layer.hidden));
  };
  if (layer.formula)
    reset_rows(FormulaFunctions{*layer.formula});
  else
    reset_rows(typename Cell::Standard());
  team.wait();
  multiply<1>(product_with_hidden<Cell, 1, Cell::gates - 1>(layer, packed, {reset, layer.hidden}, rows, descending,
                                                            share, sums, sums_panel));
}

// Computes the state after the step, what the tape keeps, and h from the sums of the panels in `share`.
// sums [panel][rows][sum][lane], a panel `sums_panel` apart; carried [panel][carried_rows][lane], the state before the
// step and then after it; out [rows][H], null: not wanted.
//
// The hidden unit of a row is finished after the gates of the next row have begun: LSTM's tanh(c) waits for all gates,
// and a processor looks less than two rows ahead (2.35 ns a unit instead of 3.0 on Zen 3).
template <class Cell, bool record>
[[gnu::noinline]] void update(Team::Share share, Size units, Size rows, const Real* sums, Size sums_panel,
                              Real* carried, Size carried_rows, StepTape tape, Real* out, Size out_row) {
  if (rows == 0) return;
  Register pending_kept[Cell::kept], pending_after{};
  Real* pending_out = nullptr;
  Size pending_count = 0;
  const typename Cell::Standard functions;
  const auto finish = [&]() GATEWISE_LAMBDA {
    store_first(Cell::hidden(functions, pending_kept, pending_after), pending_out, pending_count);
  };
  for (Size panel = share.begin; panel < share.end; ++panel) {
    const Real* sum = sums + panel * sums_panel;
    Real* state = carried + panel * carried_rows * lanes;
    Size tape_offset = panel * tape.rows * lanes;
    for (Size b = 0; b < rows; ++b, sum += Cell::sums * lanes, state += lanes, tape_offset += lanes) {
      Register unit_sums[Cell::sums], before{}, kept[Cell::kept];
      repeat<Cell::sums>([&](int i) GATEWISE_LAMBDA { unit_sums[i] = Register::load(sum + i * lanes); });
      if constexpr (Cell::carried) before = Register::load(state);
      Cell::forward(functions, unit_sums, kept);
      const Register after = Cell::after(kept, before);
      if constexpr (Cell::carried) after.store(state);
      if constexpr (record) {
        repeat<Cell::kept>([&](int i)
                               GATEWISE_LAMBDA { kept[i].store(tape.kept + tape_offset * Cell::kept + i * lanes); });
        if constexpr (Cell::carried) before.store(tape.carried + tape_offset);
      }
      if (pending_out) finish();
      repeat<Cell::kept>([&](int i) GATEWISE_LAMBDA { pending_kept[i] = kept[i]; });
      pending_after = after;
      pending_out = out ? out + b * out_row + panel * lanes : nullptr;
      pending_count = units_in(panel, units);
    }
  }
  if (pending_out) finish();
}

// The same with the functions of a formula, for inference only. peepholes [panel][i f o][lane], null: none.
template <class Cell>
[[gnu::noinline]] void update_by_formula(const Formula& formula, const Real* peepholes, Team::Share share, Size units,
                                         Size rows, const Real* sums, Size sums_panel, Real* carried, Size carried_rows,
                                         Real* out, Size out_row) {
  const FormulaFunctions functions{formula};
  for (Size panel = share.begin; panel < share.end; ++panel)
    for (Size b = 0; b < rows; ++b) {
      const Real* sum = sums + panel * sums_panel + b * Cell::sums * lanes;
      Real* state = carried + (panel * carried_rows + b) * lanes;
      Register unit_sums[Cell::sums], kept[Cell::kept], before{}, peephole[3];
      repeat<Cell::sums>([&](int i) GATEWISE_LAMBDA { unit_sums[i] = Register::load(sum + i * lanes); });
      if constexpr (Cell::carried) before = Register::load(state);
      constexpr bool may_peep = Cell::carried && !Cell::carries_hidden;  // peepholes see c
      if constexpr (may_peep)
        if (peepholes) {
          repeat<3>([&](int i) GATEWISE_LAMBDA { peephole[i] = Register::load(peepholes + (panel * 3 + i) * lanes); });
          Cell::peep_before(peephole, before, unit_sums);
        }
      Cell::forward(functions, unit_sums, kept);
      const Register after = Cell::after(kept, before);
      if constexpr (may_peep)
        if (peepholes) Cell::peep_after(functions, peephole, after, unit_sums, kept);
      if constexpr (Cell::carried) after.store(state);
      if (out)
        store_first(Cell::hidden(functions, kept, after), out + b * out_row + panel * lanes, units_in(panel, units));
    }
}

// Copies h after the i-th step from the rows that the next product reads to the caller's, in the columns of `share`,
// and then zeroes it for rows whose state is reset before the next step.
inline void copy_hidden_out(const Sequence& sequence, Size i, Team::Share share, Real* hidden) {
  const Size width = output_of(sequence.layer), active = sequence.active(i);
  const auto units = units_of(share, width);
  Real* output = sequence.step_of(sequence.output, sequence.time(i)) + units.begin;
  for (Size b = 0; b < active; ++b)
    copy(hidden + b * width + units.begin, output + sequence.row(b) * sequence.output.row, units.count());
  for (Size b = active; b < active + sequence.rows_to_clear(i); ++b)
    clear(output + sequence.row(b) * sequence.output.row, units.count());
  const Resets resets = sequence.resets_before(i + 1);
  if (!resets.flags) return;
  for (Size b = 0; b < resets.count; ++b)
    if (resets.flags[sequence.row(b)]) clear(hidden + b * width + units.begin, units.count());
}

// Loads the state before the first step, and zeroes s.zeros, which rows without a state read as h.
template <class Cell>
GATEWISE_INLINE void load_first_state(const Sequence& sequence, const Real* cell_before, const ForwardScratch<Cell>& s,
                                      const Shares& shares, bool reads_output, const Team& team) {
  const Team::Share units = shares.recurrent_units;
  if (!sequence.hidden_before || sequence.schedule.resets) {
    clear(s.zeros + units.begin, units.count());
    if (reads_output) team.wait();  // else there is another barrier before anyone reads columns of other threads
  }
  if constexpr (Cell::carried) {
    load_state(sequence, Cell::carries_hidden ? sequence.hidden_before : cell_before, sequence.layer.hidden,
               shares.hidden, s.carried);
    reset_panels(sequence, 0, shares.hidden, s.carried);
  }
  if (reads_output) return;
  const Size recurrent = output_of(sequence.layer);
  for (Real* rows : s.hidden)  // both buffers, since a row may take its first step at any time
    for (Size b = 0; b < sequence.batch; ++b)
      copy(sequence.hidden_row(0, b, s.zeros) + units.begin, rows + b * recurrent + units.begin, units.count());
  team.wait();
}

// Copies the state of the panels in `share` into the checkpoint before the i-th step, which follows the `earlier` rows
// of the checkpoints before it. Returns how many rows it has.
template <class Cell>
GATEWISE_INLINE Size write_checkpoint(const Sequence& sequence, Size i, Team::Share share, const Real* carried,
                                      Size earlier) {
  const Size rows = sequence.checkpoint_rows(i), batch = sequence.batch;
  for (Size panel = share.begin; panel < share.end && Cell::carried; ++panel)
    copy(carried + panel * batch * lanes, sequence.checkpoint(earlier) + panel * rows * lanes,
         smaller(batch, rows) * lanes);
  return rows;
}

// Computes h from the hidden units before the projection, in the columns of `share`.
template <class Cell>
GATEWISE_INLINE void project(const Layer& layer, const Panels<Cell>& packed, const ForwardScratch<Cell>& s,
                             Team::Share share, Size rows, Size batch, Rows<Real*> after) {
  const Size hidden = layer.hidden;
  multiply<1>({
      .rows = rows,
      .panels = share.count(),
      .run = hidden,
      .scalars = {.data = s.cell_hidden, .row = hidden},
      .vectors = {.data = packed.projection + share.begin * hidden * lanes, .panel = hidden * lanes, .step = lanes},
      .sums = {.data = s.projected + share.begin * batch * lanes, .panel = batch * lanes, .row = lanes},
  });
  for (Size panel = share.begin; panel < share.end; ++panel)
    for (Size b = 0; b < rows; ++b)
      store_first(Register::load(s.projected + (panel * batch + b) * lanes), after.data + b * after.row + panel * lanes,
                  units_in(panel, layer.projection));
}

// The product with h and the cell, for some panels at a time: `group` of them.
template <class Cell>
GATEWISE_INLINE void run_cells(const Layer& layer, const Panels<Cell>& packed, const ForwardScratch<Cell>& s,
                               Team::Share hidden_share, Size group, BatchRows before, Rows<Real*> after, Size rows,
                               Size batch, bool descending, Real* sums, const StepTape& tape) {
  const Size hidden = layer.hidden, sums_panel = s.ahead.rows * Cell::sums * lanes;
  for (Size done = 0; done < hidden_share.count(); done += group) {
    const Size width = smaller(group, hidden_share.count() - done),
               panel = descending ? hidden_share.end - done - width : hidden_share.begin + done;
    const Team::Share share{panel, panel + width};
    if constexpr (!Cell::resets_before)
      multiply<Cell::gates>(product_with_hidden(layer, packed, before, rows, descending, share, sums, sums_panel));
    Real* const out = layer.projection ? s.cell_hidden : after.data;
    const Size out_row = layer.projection ? hidden : after.row;
    if (layer.formula)
      update_by_formula<Cell>(*layer.formula, packed.peephole, share, hidden, rows, sums, sums_panel, s.carried, batch,
                              out, out_row);
    else
      (tape.kept ? update<Cell, true> : update<Cell, false>)(share, hidden, rows, sums, sums_panel, s.carried, batch,
                                                             tape, out, out_row);
  }
}

// How many panels are multiplied before the cell works on them.
template <class Cell>
GATEWISE_INLINE Size panels_of_group(Size panels, Size batch) {
  const Size values = group_bytes / Size(sizeof(Real)), panel_values = larger(1, batch * Cell::sums * lanes);
  return panels * panel_values <= values ? panels : larger(1, values / panel_values);
}

// Where h after the i-th step goes: to the output, or to a buffer that the next product reads.
template <class Cell>
GATEWISE_INLINE Rows<Real*> rows_after(const Sequence& sequence, Size i, const ForwardScratch<Cell>& s,
                                       bool reads_output) {
  if (!reads_output) return {s.hidden[(i + 1) % 2], 0, output_of(sequence.layer)};
  const Rows<Real*>& output = sequence.output;
  return {sequence.step_of(output, sequence.time(i)) + sequence.first * output.row, 0, output.row};
}

// Writes the state after the last step of each row.
template <class Cell>
GATEWISE_INLINE void store_last_state(const Sequence& sequence, const ForwardScratch<Cell>& s, const Shares& shares,
                                      Real* hidden_after, Real* cell_after) {
  const Team::Share units = shares.recurrent_units;
  for (Size b = 0; b < sequence.batch; ++b)
    copy(sequence.hidden_after(b, s.zeros) + units.begin,
         hidden_after + sequence.row(b) * output_of(sequence.layer) + units.begin, units.count());
  if (cell_after) store_state(sequence, s.carried, sequence.layer.hidden, shares.hidden, cell_after);
}

// Runs all steps. Returns false if it was interrupted.
template <class Cell>
bool forward_steps(const Sequence& sequence, const Real* cell_before, Real* hidden_after, Real* cell_after,
                   Real* scratch, const Team& team) {
  const Layer& layer = sequence.layer;
  const Size steps = sequence.steps, batch = sequence.batch, recurrent = output_of(layer);
  const Shares shares(layer, team);
  const bool reads_output = sequence.reads_output();
  Arena arena{scratch};
  const Panels<Cell> packed = packed_panels<Cell>(layer);
  const ForwardScratch<Cell> s(arena, layer, steps, batch, sequence.needs_gather(), reads_output);
  const Size sums_row = Cell::sums * lanes, sums_panel = s.ahead.rows * sums_row;
  load_first_state(sequence, cell_before, s, shares, reads_output, team);

  const Size group = panels_of_group<Cell>(panels_of(layer.hidden), batch);
  const Size every = sequence.tape.checkpoint_every;
  Size checkpointed = 0;  // rows of the checkpoints so far
  InterruptCountdown countdown = sequence.countdown();
  for (Size ahead = 0; ahead < steps;) {
    const Size count = sequence.steps_within(ahead, 1, steps - ahead, s.ahead.rows),
               lowest = sequence.lowest_time(ahead, count);
    start_sums(sequence, packed, s.ahead, lowest, count, shares.hidden, team);
    for (Size i = ahead; i < ahead + count; ++i) {
      const Size time = sequence.time(i), rows = sequence.active(i);
      const BatchRows before = reads_output ? sequence.hidden_at(i, s.zeros) : BatchRows{s.hidden[i % 2], recurrent};
      const Rows<Real*> after = rows_after(sequence, i, s, reads_output);
      StepTape tape;
      if (sequence.tape.kept) tape = sequence.step_tape(Cell(), {sequence.tape.kept, sequence.tape.carried, 0}, i, 0);
      if (every > 0 && i % every == 0)
        checkpointed += write_checkpoint<Cell>(sequence, i, shares.hidden, s.carried, checkpointed);
      Real* sums = s.ahead.sums + sequence.rows_between(lowest, time) * sums_row;
      const bool descending = is_descending(i);
      if constexpr (Cell::resets_before)
        add_reset_hidden(layer, packed, before, rows, descending, shares.hidden, sums, sums_panel, s.carried, batch,
                         s.reset, team);
      run_cells(layer, packed, s, shares.hidden, group, before, after, rows, batch, descending, sums, tape);
      if (layer.projection) {
        team.wait();
        project(layer, packed, s, shares.projection, rows, batch, after);
      }
      if (!reads_output) {
        copy_hidden_out(sequence, i, shares.recurrent, after.data);
        if (Cell::carried) reset_panels(sequence, i + 1, shares.hidden, s.carried);
      }
      if (!countdown.wait(team, sequence.interrupt)) return false;
    }
    ahead += count;
  }

  store_last_state(sequence, s, shares, hidden_after, cell_after);
  return true;
}

// Recomputes the steps [first, first + count) and writes what a tape of everything keeps of them into `tape`, which
// begins at the earliest of their times. `carried` is the state before the steps, and becomes that after them. Since h
// of all steps is known, the products of many steps are made at once, in as few passes over the weights as the scratch
// allows; the sums have the same bits either way. Returns false if it was interrupted.
template <class Cell>
bool replay_steps(const Sequence& sequence, const Panels<Cell>& packed, Size first, Size count, Real* carried,
                  const RowsScratch<Cell>& s, const Real* zeros, const StepTape& tape, const Team& team) {
  const Layer& layer = sequence.layer;
  const Size recurrent = output_of(layer), from_time = sequence.lowest_time(first, count);
  const Size sums_row = Cell::sums * lanes, sums_panel = s.rows * sums_row;
  const Team::Share share = team.share(panels_of(layer.hidden));
  for (const Size end = first + count; first < end;) {
    const Size width = sequence.steps_within(first, 1, end - first, s.rows),
               lowest = sequence.lowest_time(first, width);
    gather_rows(
        sequence, lowest, width, recurrent, [&](Size i, Size b) { return sequence.hidden_row(i, b, zeros); }, s.hidden,
        team);
    if (!s.input) team.wait();
    start_sums(sequence, packed, s, lowest, width, share, team);
    multiply_interruptibly<Cell::gates>(
        product_with_hidden(layer, packed, {s.hidden, recurrent}, sequence.rows_between(lowest, lowest + width), false,
                            share, s.sums, sums_panel),
        team, sequence.interrupt);
    for (Size i = first; i < first + width; ++i) {
      update<Cell, true>(share, layer.hidden, sequence.active(i),
                         s.sums + sequence.rows_between(lowest, sequence.time(i)) * sums_row, sums_panel, carried,
                         sequence.batch, sequence.step_tape(Cell(), tape, i, from_time), nullptr, 0);
      if (Cell::carried) reset_panels(sequence, i + 1, share, carried);
    }
    if (!team.goes_on(sequence.interrupt)) return false;  // all threads are done before the rows are overwritten
    first += width;
  }
  return true;
}

}  // namespace gatewise::GATEWISE_KERNEL
