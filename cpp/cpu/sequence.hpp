// One layer in one direction through time: what forward.hpp and backward.hpp share.
//
// Everything between two products lies in panels, [panel][row][value][lane]. Each thread owns full_batch panels, so
// that the elementwise work of a unit happens in the thread that made its sums. Rows of the batch, [row][unit], are
// what products read as scalars: the input, and h.
//
// Threads divide the panels among them. They wait for each other once a step, when h (forward) or the gradients of the
// sums (backward) are complete.
//
// Rows of different lengths are sorted, longest first, so that the rows that take a step are always the first ones, in
// either direction. Nothing is touched for a row that does not take the step.
#pragma once

#include "packing.hpp"
#include "threads.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Every second step reads the weights from the last panel to the first: it begins with those that are still in the
// cache. (One row: 8 % faster for H 64, half of whose weights fit into L1, and for H 256 and L2
// cache; many rows: no difference.)
inline bool is_descending(Size step) { return step % 2 == 1; }

// What the tape keeps of one step.
struct StepTape {
  Real* kept = nullptr;     // [panel][rows][kept][lane]
  Real* carried = nullptr;  // [panel][rows][lane], the state before the step
  Size rows = 0;            // of a panel
};

// How many rows take any of the `every` steps of the recurrence beginning with the i-th: as many as take the earliest
// in time of these steps, and the first ones in the order of lengths.
inline Size rows_from(const Schedule& schedule, Size steps, Size batch, bool reverse, Size i, Size every) {
  if (!schedule.active) return batch;
  return schedule.active[reverse ? steps - smaller(i + every, steps) : i];
}

// What the tape keeps of one sequence: either everything of each step, in the order of time; or checkpoints, the state
// before every k-th step, in the order of the recurrence, of the rows that take a step before the next checkpoint.
struct SequenceTape {
  Real* kept = nullptr;     // [rows of all steps], a step as above
  Real* carried = nullptr;  // likewise, or [rows of all checkpoints], each [panel][rows][lane]
  Size checkpoint_every = 0;
  Size rows = 0;  // of all steps, or of all checkpoints

  SequenceTape() = default;
  template <class Cell>
  SequenceTape(Arena& arena, Cell, const Layer& layer, const Call& call, bool reverse)
      : checkpoint_every(call.checkpoint_every) {
    const Size units = panels_of(layer.hidden) * lanes, every = larger(1, checkpoint_every);
    if (!call.schedule.active) rows = (call.steps + every - 1) / every * call.batch;
    for (Size i = 0; i < call.steps && call.schedule.active; i += every)
      rows += rows_from(call.schedule, call.steps, call.batch, reverse, i, every);
    kept = checkpoint_every ? nullptr : arena.take(rows * units * Cell::kept);
    carried = Cell::carried ? arena.take(rows * units) : nullptr;
  }
};

// The rows [B][units] of one step.
struct BatchRows {
  const Real* data;
  Size row;
};

// The rows whose state is set to zero before a step: those that are flagged among the first `count`.
struct Resets {
  const std::uint8_t* flags;  // of the caller's rows; null: none
  Size count;
};

// Counts down the steps until the next look at the interrupt.
class InterruptCountdown {
 public:
  explicit InterruptCountdown(Size every) : every_(every) {}
  // Waits for the team after a step. Returns false if the call must end.
  bool wait(const Team& team, Interrupt* interrupt) {
    if (--left_ > 0) {
      team.wait();
      return true;
    }
    left_ = every_;
    return team.goes_on(interrupt);
  }

 private:
  Size every_, left_ = every_;
};

// A product on one thread, some panels at a time. Once the call is asked to end, the remaining panels are left out.
template <int G>
void multiply_in_parts(Product product, const Team& team, Interrupt* interrupt) {
  constexpr Size operations_at_a_time = 8 * look_operations;
  const Size panel = product.rows * product.segments * product.run * G * lanes;
  const Size most = larger(1, operations_at_a_time / larger(1, panel));
  for (Size left = product.panels; left > 0; left -= product.panels) {
    product.panels = smaller(left, most);
    multiply<G>(product);
    if (left == product.panels || team.is_asked_to_end(interrupt)) return;
    product.vectors.data += product.panels * product.vectors.panel;
    product.sums.data += product.panels * product.sums.panel;
    if (product.start.data) product.start.data += product.panels * product.start.panel;
  }
}
// Without an interrupt, the division in multiply_in_parts is saved: it would slow down small steps.
template <int G>
GATEWISE_INLINE void multiply_interruptibly(const Product& product, const Team& team, Interrupt* interrupt) {
  if (interrupt)
    multiply_in_parts<G>(product, team, interrupt);
  else
    multiply<G>(product);
}

struct Sequence {
  Layer layer;
  Size steps, batch;
  Size first, full_batch;  // the batch may be a part of a larger one: its rows beginning with `first`
  bool reverse;
  Schedule schedule;
  Rows<const Real*> input;                   // [T, full_batch, I]
  Rows<Real*> output;                        // [T, full_batch, R]
  const Real* hidden_before;                 // [full_batch, R]; null: zero
  SequenceTape tape;                         // empty: nothing is recorded
  const std::int64_t* table_rows = nullptr;  // [T, full_batch] rows of `table`, in place of input products; null: none
  const Real* table = nullptr;               // [row][panel][sum][lane]
  Interrupt* interrupt = nullptr;

  InterruptCountdown countdown() const {
    if (!interrupt) return InterruptCountdown(PTRDIFF_MAX);
    const Size step =
        batch * layer.hidden * (gates_of(layer.cell) * (layer.input + output_of(layer)) + layer.projection);
    return InterruptCountdown(larger(1, look_operations / larger(1, step)));
  }

  // Whether the rows of consecutive steps are not contiguous, and must be gathered.
  bool needs_gather() const { return !schedule.packed && (schedule.order || batch != full_batch); }
  // Whether a step can read h of the step before from the output.
  bool reads_output() const { return !schedule.order && !schedule.resets; }

  // The i-th step of the recurrence.
  Size time(Size i) const { return reverse ? steps - 1 - i : i; }
  // The earliest time of the steps i ... i + count - 1.
  Size lowest_time(Size i, Size count) const { return reverse ? steps - i - count : i; }

  // The rows of one time in a sequence.
  template <class Pointer>
  Pointer step_of(Rows<Pointer> rows, Size at) const {
    return rows.data + (schedule.packed ? schedule.rows_before[at] * rows.row : at * rows.step);
  }
  // How many rows do not take the i-th step, and become zero in the output.
  Size rows_to_clear(Size i) const { return schedule.packed ? 0 : batch - active(i); }

  // The caller's number of row b.
  Size row(Size b) const { return schedule.order ? schedule.order[b] : first + b; }
  Size length(Size b) const { return schedule.sorted_lengths ? schedule.sorted_lengths[b] : steps; }
  // How many rows take the i-th step, and how many rows the steps between two times have together.
  Size active(Size i) const { return schedule.active ? schedule.active[time(i)] : batch; }
  Size rows_between(Size from, Size to) const {
    return schedule.rows_before ? schedule.rows_before[to] - schedule.rows_before[from] : (to - from) * batch;
  }
  // How many steps, beginning with the i-th, have no more than `rows` rows together: at least one, at most `most`.
  // way: 1 to go on, -1 to go back.
  Size steps_within(Size i, Size way, Size most, Size rows) const {
    if (!schedule.active) return larger(1, smaller(most, rows / larger(1, batch)));
    Size count = 0;
    do {
      rows -= active(i);
      i += way;
      ++count;
    } while (count < most && active(i) <= rows);
    return count;
  }

  Resets resets_before(Size i) const {
    const Size at = reverse ? time(i) + 1 : time(i);  // a reset between two steps is one in either direction
    if (!schedule.resets || at == steps || i == steps) return {nullptr, 0};
    return {schedule.resets + at * full_batch, reverse ? active(i - 1) : active(i)};
  }

  // h before the i-th step, if the rows of all steps lie at the same distance.
  BatchRows hidden_at(Size i, const Real* zeros) const {
    if (i > 0) return {step_of(output, time(i - 1)) + first * output.row, output.row};
    if (hidden_before) return {hidden_before + first * output_of(layer), output_of(layer)};
    return {zeros, 0};
  }
  // The same for one row, wherever it lies.
  const Real* hidden_row(Size i, Size b, const Real* zeros) const {
    const Resets resets = resets_before(i);
    if (resets.flags && b < resets.count && resets.flags[row(b)]) return zeros;
    if (reverse ? time(i) + 1 < length(b) : i > 0) return step_of(output, time(i - 1)) + row(b) * output.row;
    return hidden_before ? hidden_before + row(b) * output_of(layer) : zeros;
  }
  // h after the last step of a row.
  const Real* hidden_after(Size b, const Real* zeros) const {
    if (length(b) > 0) return step_of(output, reverse ? 0 : length(b) - 1) + row(b) * output.row;
    return hidden_before ? hidden_before + row(b) * output_of(layer) : zeros;
  }
  const Real* input_row(Size i, Size b) const { return step_of(input, time(i)) + row(b) * input.row; }

  // The i-th step in a tape of everything that begins at `from_time`.
  template <class Cell>
  StepTape step_tape(Cell, const StepTape& steps_kept, Size i, Size from_time) const {
    const Size units = panels_of(layer.hidden) * lanes, at = time(i);
    const Size before = schedule.rows_before ? schedule.rows_before[at] - schedule.rows_before[from_time]
                                             : (at - from_time) * full_batch;
    return {steps_kept.kept + (before * units + first * lanes) * Cell::kept,
            Cell::carried ? steps_kept.carried + before * units + first * lanes : nullptr,
            schedule.active ? schedule.active[at] : full_batch};
  }
  // How many rows the checkpoint before the i-th step has; and its state, which follows the `earlier` rows of the
  // checkpoints before it.
  Size checkpoint_rows(Size i) const {
    return rows_from(schedule, steps, full_batch, reverse, i, tape.checkpoint_every);
  }
  Real* checkpoint(Size earlier) const {
    return tape.carried + earlier * panels_of(layer.hidden) * lanes + first * lanes;
  }
};

inline void clear(Real* values, Size count) {
  for (Size i = 0; i < count; ++i) values[i] = 0;
}
inline void copy(const Real* from, Real* to, Size count) {
  for (Size i = 0; i < count; ++i) to[i] = from[i];
}

// Copy the columns of the panels in `share` between the caller's rows [full_batch][units] and panels [panel][B][lane].
// Null rows are zero.
inline void load_state(const Sequence& sequence, const Real* from, Size units, Team::Share share, Real* panels) {
  for (Size panel = share.begin; panel < share.end; ++panel)
    for (Size b = 0; b < sequence.batch; ++b)
      (from ? load_first(from + sequence.row(b) * units + panel * lanes, units_in(panel, units))
            : Register::broadcast(0))
          .store(panels + (panel * sequence.batch + b) * lanes);
}
inline void store_state(const Sequence& sequence, const Real* panels, Size units, Team::Share share, Real* to) {
  for (Size panel = share.begin; panel < share.end; ++panel)
    for (Size b = 0; b < sequence.batch; ++b)
      store_first(Register::load(panels + (panel * sequence.batch + b) * lanes),
                  to + sequence.row(b) * units + panel * lanes, units_in(panel, units));
}

// The units of the panels in `share`.
inline Team::Share units_of(Team::Share share, Size units) {
  return {share.begin * lanes, smaller(share.end * lanes, units)};
}

// The panels of H, of the projection and of h that belong to one thread, and the units of these last ones.
struct Shares {
  Team::Share hidden, projection, recurrent, recurrent_units;

  GATEWISE_INLINE Shares(const Layer& layer, const Team& team)
      : hidden(team.share(panels_of(layer.hidden))),
        projection(team.share(panels_of(layer.projection))),
        recurrent(layer.projection ? projection : hidden),
        recurrent_units(units_of(recurrent, output_of(layer))) {}
};

// Zeroes the panels [panel][B][lane] in `share` for rows whose state is reset before the i-th step.
inline void reset_panels(const Sequence& sequence, Size i, Team::Share share, Real* panels) {
  const Resets resets = sequence.resets_before(i);
  if (!resets.flags) return;
  for (Size b = 0; b < resets.count; ++b)
    if (resets.flags[sequence.row(b)])
      for (Size panel = share.begin; panel < share.end; ++panel)
        Register::broadcast(0).store(panels + (panel * sequence.batch + b) * lanes);
}

}  // namespace gatewise::GATEWISE_KERNEL
