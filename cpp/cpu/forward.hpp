// Forward through time, one layer and direction.
#pragma once

#include "activate.hpp"
#include "sequence.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Sums of the input products that are made ahead of the recurrence: what stays in the second cache meanwhile, or, where
// that is only a few rows, as many rows as make one passage over the weights pay. (H 650, B 20: 5 % faster.)
constexpr Size ahead_bytes = 128 * 1024;
constexpr Size ahead_rows = 96;
// Sums of some panels between their product and the cell: what stays in the first cache.
constexpr Size group_bytes = 8 * 1024;

// Forward, threads are cut into groups, each with rows of the batch to itself: as many as have rows_alone of them. Rows
// of different lengths stay together, since fewer and fewer take a step.
inline int groups_for(int threads, const Call& call) {
  const Size most = smaller(most_groups, larger(1, call.batch / rows_alone(call.stack.layer->hidden)));
  int groups = call.schedule.order ? 1 : threads;
  while (groups > most || threads % groups != 0) --groups;
  return groups;
}

// The rows of some steps that are worked on at a time, in the order of time.
template <class Cell>
struct RowsScratch {
  Size rows;
  Real* sums;    // [panel of H][rows][sum][lane]
  Real* input;   // [rows][I], where rows are brought together; else null
  Real* hidden;  // [rows][R], likewise

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
  Real* hidden[2];    // [B][R], h of this step and the next where the output cannot be read instead
  Real* reset;        // [B][H], r * h where the cell multiplies that

  ForwardScratch(Arena& arena, const Layer& layer, Size steps, Size batch, bool scattered, bool direct)
      : ahead(arena, layer, steps, batch, scattered, false) {
    carried = arena.take(panels_of(layer.hidden) * batch * lanes);
    zeros = arena.take(output_of(layer));
    cell_hidden = arena.take(layer.projection ? batch * layer.hidden : 0);
    projected = arena.take(panels_of(layer.projection) * batch * lanes);
    for (Real*& rows : hidden) rows = arena.take(direct ? 0 : batch * output_of(layer));
    reset = arena.take(Cell::resets_before ? batch * layer.hidden : 0);
  }
};

// The rows row_at(i, b) [units] of the steps between two times brought together, a share of the steps by each thread.
template <class RowAt>
void gather_rows(const Sequence& sequence, Size lowest, Size count, Size units, const RowAt& row_at, Real* to,
                 const Team& team) {
  const Team::Share own = team.share(count);
  to += sequence.rows_between(lowest, lowest + own.begin) * units;
  for (Size t = lowest + own.begin; t < lowest + own.end; ++t) {
    const Size i = sequence.time(t);  // its own inverse
    for (Size b = 0; b < sequence.active(i); ++b, to += units) copy(row_at(i, b), to, units);
  }
}

// The product with one set of rows, over all times at once where rows follow each other at one stride.
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

// The sums that no input feeds start from their bias.
template <class Cell>
void start_unfed_sums(const Panels<Cell>& packed, Team::Share share, Size rows, Real* sums, Size panel, Size row) {
  for (Size p = share.begin; p < share.end && Cell::sums > Cell::gates; ++p)
    for (Size m = 0; m < rows; ++m)
      repeat<Cell::sums - Cell::gates>([&](int i) GATEWISE_LAMBDA {
        const Size sum = (Cell::gates + i) * lanes;
        Register::load(packed.bias + p * Cell::sums * lanes + sum).store(sums + p * panel + m * row + sum);
      });
}

// Rows [row][panel][sum][lane] of the sums that start_sums makes, to be looked up later. The same product, and so the
// same bits.
template <class Cell>
void make_input_sums(const Layer& layer, Size rows, const Real* input, Size input_row, Real* sums) {
  constexpr int G = Cell::gates;
  Arena packed_arena{const_cast<Real*>(static_cast<const Real*>(layer.packed))};
  const Panels<Cell> packed(packed_arena, layer);
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
  start_unfed_sums(packed, {0, panels}, rows, sums, panel, row);
}

template <class Cell>
void look_up_sums(const Sequence& sequence, const RowsScratch<Cell>& s, Size lowest, Size count, Team::Share share) {
  const Size row = Cell::sums * lanes, table_row = panels_of(sequence.layer.hidden) * row, panel = s.rows * row;
  Real* to = s.sums;
  for (Size t = lowest; t < lowest + count; ++t)
    for (Size b = 0; b < sequence.active(sequence.time(t)); ++b, to += row) {  // time() is its own inverse
      const Real* from = sequence.table + sequence.place[t * sequence.whole + sequence.row(b)] * table_row;
      for (Size p = share.begin; p < share.end; ++p) copy(from + p * row, to + p * panel, row);
    }
}

// Sums [panel][rows][sum][lane] of the panels in `share`: bias and the product with the input of the steps between two
// times.
template <class Cell>
void start_sums(const Sequence& sequence, const Panels<Cell>& packed, const RowsScratch<Cell>& s, Size lowest,
                Size count, Team::Share share, const Team& team) {
  constexpr int G = Cell::gates;
  const Size inputs = sequence.layer.input, row = Cell::sums * lanes, panel = s.rows * row;
  const Size rows = sequence.rows_between(lowest, lowest + count);
  if (sequence.place) return look_up_sums<Cell>(sequence, s, lowest, count, share);
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
  start_unfed_sums(packed, share, rows, s.sums, panel, row);
}

// The product with h that adds to the sums of the panels in `share`: of all gates that it feeds, or of G of them from
// the first on.
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

// Adds the products of a cell that multiplies r * h for its last gate: r of all units comes first.
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
  layer.formula ? reset_rows(OfFormula{*layer.formula}) : reset_rows(typename Cell::Own());
  team.wait();
  multiply<1>(product_with_hidden<Cell, 1, Cell::gates - 1>(layer, packed, {reset, layer.hidden}, rows, descending,
                                                            share, sums, sums_panel));
}

// Sums of the panels in `share` become the state after the step, what the tape keeps, and h.
// sums [panel][rows][sum][lane], a panel `sums_panel` apart; carried [panel][carried_rows][lane], before the step and
// after it; out [rows][H], null: not wanted.
//
// The hidden unit of one row is finished while the next row is at its gates: LSTM's tanh(c) waits for all of them, and
// a processor looks ahead less than two rows (2.35 ns a unit instead of 3.0 on Zen 3).
template <class Cell, bool record>
[[gnu::noinline]] void update(Team::Share share, Size units, Size rows, const Real* sums, Size sums_panel,
                              Real* carried, Size carried_rows, StepTape tape, Real* out, Size out_row) {
  if (rows == 0) return;
  Register kept_of[Cell::kept], after_of{};
  Real* out_of = nullptr;
  Size count_of = 0;
  const typename Cell::Own functions;
  const auto finish = [&]() GATEWISE_LAMBDA {
    store_first(Cell::hidden(functions, kept_of, after_of), out_of, count_of);
  };
  for (Size panel = share.begin; panel < share.end; ++panel) {
    const Real* sum = sums + panel * sums_panel;
    Real* state = carried + panel * carried_rows * lanes;
    Size place = panel * tape.rows * lanes;
    for (Size b = 0; b < rows; ++b, sum += Cell::sums * lanes, state += lanes, place += lanes) {
      Register sum_of[Cell::sums], before{}, kept[Cell::kept];
      repeat<Cell::sums>([&](int i) GATEWISE_LAMBDA { sum_of[i] = Register::load(sum + i * lanes); });
      if constexpr (Cell::carried) before = Register::load(state);
      Cell::forward(functions, sum_of, kept);
      const Register after = Cell::after(kept, before);
      if constexpr (Cell::carried) after.store(state);
      if constexpr (record) {
        repeat<Cell::kept>([&](int i) GATEWISE_LAMBDA { kept[i].store(tape.kept + place * Cell::kept + i * lanes); });
        if constexpr (Cell::carried) before.store(tape.carried + place);
      }
      if (out_of) finish();
      repeat<Cell::kept>([&](int i) GATEWISE_LAMBDA { kept_of[i] = kept[i]; });
      after_of = after;
      out_of = out ? out + b * out_row + panel * lanes : nullptr;
      count_of = units_in(panel, units);
    }
  }
  if (out_of) finish();
}

// The same with the functions of a formula, for inference. peepholes [panel][i f o][lane], null: none.
template <class Cell>
[[gnu::noinline]] void update_by_formula(const Formula& formula, const Real* peepholes, Team::Share share, Size units,
                                         Size rows, const Real* sums, Size sums_panel, Real* carried, Size carried_rows,
                                         Real* out, Size out_row) {
  const OfFormula functions{formula};
  for (Size panel = share.begin; panel < share.end; ++panel)
    for (Size b = 0; b < rows; ++b) {
      const Real* sum = sums + panel * sums_panel + b * Cell::sums * lanes;
      Real* state = carried + (panel * carried_rows + b) * lanes;
      Register sum_of[Cell::sums], kept[Cell::kept], before{}, peephole[3];
      repeat<Cell::sums>([&](int i) GATEWISE_LAMBDA { sum_of[i] = Register::load(sum + i * lanes); });
      if constexpr (Cell::carried) before = Register::load(state);
      constexpr bool may_peep = Cell::carried && !Cell::carries_hidden;  // at c
      if constexpr (may_peep)
        if (peepholes) {
          repeat<3>([&](int i) GATEWISE_LAMBDA { peephole[i] = Register::load(peepholes + (panel * 3 + i) * lanes); });
          Cell::peep_before(peephole, before, sum_of);
        }
      Cell::forward(functions, sum_of, kept);
      const Register after = Cell::after(kept, before);
      if constexpr (may_peep)
        if (peepholes) Cell::peep_after(functions, peephole, after, sum_of, kept);
      if constexpr (Cell::carried) after.store(state);
      if (out)
        store_first(Cell::hidden(functions, kept, after), out + b * out_row + panel * lanes, units_in(panel, units));
    }
}

// h after the i-th step goes from the rows that the next product reads to the caller's, in the columns of `share`;
// where the state starts anew, the next product reads zeros.
inline void hand_over(const Sequence& sequence, Size i, Team::Share share, Real* hidden) {
  const Size width = output_of(sequence.layer), active = sequence.active(i);
  const auto own = units_of(share, width);
  Real* output = sequence.step_of(sequence.output, sequence.time(i)) + own.begin;
  for (Size b = 0; b < active; ++b)
    copy(hidden + b * width + own.begin, output + sequence.row(b) * sequence.output.row, own.count());
  for (Size b = active; b < active + sequence.rows_to_clear(i); ++b)
    clear(output + sequence.row(b) * sequence.output.row, own.count());
  const Resets resets = sequence.resets_before(i + 1);
  if (!resets.flags) return;
  for (Size b = 0; b < resets.count; ++b)
    if (resets.flags[sequence.row(b)]) clear(hidden + b * width + own.begin, own.count());
}

// False: it was interrupted.
template <class Cell>
bool forward_steps(const Sequence& sequence, const Real* cell_before, Real* hidden_after, Real* cell_after,
                   Real* scratch, const Team& team) {
  const Layer& layer = sequence.layer;
  const Size steps = sequence.steps, batch = sequence.batch, hidden = layer.hidden, recurrent = output_of(layer);
  const Size panels = panels_of(hidden);
  const Team::Share own = team.share(panels), own_projection = team.share(panels_of(layer.projection));
  const Team::Share own_hidden = layer.projection ? own_projection : own, own_units = units_of(own_hidden, recurrent);
  const bool direct = sequence.direct();
  Arena packed_arena{const_cast<Real*>(static_cast<const Real*>(layer.packed))}, arena{scratch};
  const Panels<Cell> packed(packed_arena, layer);
  const ForwardScratch<Cell> s(arena, layer, steps, batch, sequence.scattered(), direct);
  const Size sums_row = Cell::sums * lanes, sums_panel = s.ahead.rows * sums_row;
  if (!sequence.hidden_before || sequence.schedule.resets) {
    clear(s.zeros + own_units.begin, own_units.count());
    if (direct) team.wait();  // else there is another meeting before the others' columns are read
  }
  if constexpr (Cell::carried) {
    load_state(sequence, Cell::carries_hidden ? sequence.hidden_before : cell_before, hidden, own, s.carried);
    reset_panels(sequence, 0, own, s.carried);
  }
  if (!direct) {
    // Both, since a row may take its first step at any time.
    for (Real* rows : s.hidden)
      for (Size b = 0; b < batch; ++b)
        copy(sequence.hidden_row(0, b, s.zeros) + own_units.begin, rows + b * recurrent + own_units.begin,
             own_units.count());
    team.wait();
  }

  const Size group_values = group_bytes / Size(sizeof(Real)), panel_values = larger(1, batch * sums_row);
  const Size group = panels * panel_values <= group_values ? panels : larger(1, group_values / panel_values);
  const Size every = sequence.tape.checkpoint_every;
  Size checkpointed = 0;  // rows of the checkpoints so far
  Looks looks = sequence.looks();
  for (Size ahead = 0; ahead < steps;) {
    const Size count = sequence.steps_within(ahead, 1, steps - ahead, s.ahead.rows),
               lowest = sequence.lowest_time(ahead, count);
    start_sums(sequence, packed, s.ahead, lowest, count, own, team);
    for (Size i = ahead; i < ahead + count; ++i) {
      const Size time = sequence.time(i), rows = sequence.active(i);
      const BatchRows before = direct ? sequence.hidden_at(i, s.zeros) : BatchRows{s.hidden[i % 2], recurrent};
      const Rows<Real*> after =
          direct ? Rows<Real*>{sequence.step_of(sequence.output, time) + sequence.first * sequence.output.row, 0,
                               sequence.output.row}
                 : Rows<Real*>{s.hidden[(i + 1) % 2], 0, recurrent};
      StepTape tape;
      if (sequence.tape.kept) tape = sequence.step_tape(Cell(), {sequence.tape.kept, sequence.tape.carried, 0}, i, 0);
      if (every > 0 && i % every == 0) {
        const Size kept_rows = sequence.checkpoint_rows(i);
        for (Size panel = own.begin; panel < own.end && Cell::carried; ++panel)
          copy(s.carried + panel * batch * lanes, sequence.checkpoint(checkpointed) + panel * kept_rows * lanes,
               smaller(batch, kept_rows) * lanes);
        checkpointed += kept_rows;
      }
      Real* sums = s.ahead.sums + sequence.rows_between(lowest, time) * sums_row;
      const bool descending = turns_back(i);
      if constexpr (Cell::resets_before)
        add_reset_hidden(layer, packed, before, rows, descending, own, sums, sums_panel, s.carried, batch, s.reset,
                         team);
      for (Size done = 0; done < own.count(); done += group) {
        const Size width = smaller(group, own.count() - done),
                   panel = descending ? own.end - done - width : own.begin + done;
        const Team::Share share{panel, panel + width};
        if constexpr (!Cell::resets_before)
          multiply<Cell::gates>(product_with_hidden(layer, packed, before, rows, descending, share, sums, sums_panel));
        Real* const out = layer.projection ? s.cell_hidden : after.data;
        const Size out_row = layer.projection ? hidden : after.row;
        if (layer.formula)
          update_by_formula<Cell>(*layer.formula, packed.peephole, share, hidden, rows, sums, sums_panel, s.carried,
                                  batch, out, out_row);
        else
          (tape.kept ? update<Cell, true> : update<Cell, false>)(share, hidden, rows, sums, sums_panel, s.carried,
                                                                 batch, tape, out, out_row);
      }
      if (layer.projection) {
        team.wait();
        multiply<1>({
            .rows = rows,
            .panels = own_projection.count(),
            .run = hidden,
            .scalars = {.data = s.cell_hidden, .row = hidden},
            .vectors = {.data = packed.projection + own_projection.begin * hidden * lanes,
                        .panel = hidden * lanes,
                        .step = lanes},
            .sums = {.data = s.projected + own_projection.begin * batch * lanes, .panel = batch * lanes, .row = lanes},
        });
        for (Size panel = own_projection.begin; panel < own_projection.end; ++panel)
          for (Size b = 0; b < rows; ++b)
            store_first(Register::load(s.projected + (panel * batch + b) * lanes),
                        after.data + b * after.row + panel * lanes, units_in(panel, recurrent));
      }
      if (!direct) {
        hand_over(sequence, i, own_hidden, after.data);
        if (Cell::carried) reset_panels(sequence, i + 1, own, s.carried);
      }
      if (!looks.wait(team, sequence.interrupt)) return false;
    }
    ahead += count;
  }

  for (Size b = 0; b < batch; ++b)
    copy(sequence.hidden_after(b, s.zeros) + own_units.begin,
         hidden_after + sequence.row(b) * recurrent + own_units.begin, own_units.count());
  if (cell_after) store_state(sequence, s.carried, hidden, own, cell_after);
  return true;
}

// What a tape of everything would keep of the steps [first, first + count), into `tape`, whose steps begin at the
// lowest of their times; from the state before them: `carried`, in which it ends. Their h is known, so that all
// products come before the cells, in as few passages over the weights as there is scratch for; the sums have the same
// bits either way. False: it was interrupted.
template <class Cell>
bool replay_steps(const Sequence& sequence, const Panels<Cell>& packed, Size first, Size count, Real* carried,
                  const RowsScratch<Cell>& s, const Real* zeros, const StepTape& tape, const Team& team) {
  const Layer& layer = sequence.layer;
  const Size recurrent = output_of(layer), from_time = sequence.lowest_time(first, count);
  const Size sums_row = Cell::sums * lanes, sums_panel = s.rows * sums_row;
  const Team::Share own = team.share(panels_of(layer.hidden));
  for (const Size end = first + count; first < end;) {
    const Size width = sequence.steps_within(first, 1, end - first, s.rows),
               lowest = sequence.lowest_time(first, width);
    gather_rows(
        sequence, lowest, width, recurrent, [&](Size i, Size b) { return sequence.hidden_row(i, b, zeros); }, s.hidden,
        team);
    if (!s.input) team.wait();
    start_sums(sequence, packed, s, lowest, width, own, team);
    multiply_interruptibly<Cell::gates>(
        product_with_hidden(layer, packed, {s.hidden, recurrent}, sequence.rows_between(lowest, lowest + width), false,
                            own, s.sums, sums_panel),
        team, sequence.interrupt);
    for (Size i = first; i < first + width; ++i) {
      update<Cell, true>(own, layer.hidden, sequence.active(i),
                         s.sums + sequence.rows_between(lowest, sequence.time(i)) * sums_row, sums_panel, carried,
                         sequence.batch, sequence.step_tape(Cell(), tape, i, from_time), nullptr, 0);
      if (Cell::carried) reset_panels(sequence, i + 1, own, carried);
    }
    if (!team.goes_on(sequence.interrupt)) return false;  // all meet before the rows are overwritten
    first += width;
  }
  return true;
}

}  // namespace gatewise::GATEWISE_KERNEL
