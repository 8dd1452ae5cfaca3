// One layer in one direction through time: what forward.hpp and backward.hpp share.
//
// Everything between two products lies in panels, [panel][row][value][lane], so that each thread owns whole panels of
// everything and the elementwise work of a unit happens where its sums were made. Rows of the batch, [row][unit], are
// what products read as scalars: the input, and h.
//
// Threads share panels; they meet once a step, when h (forward) or the gradients of the sums (backward) are complete.
//
// Rows of different lengths are taken in the order of their lengths, so that those that take a step are always the
// first ones, in either direction: what a row has no step for is simply not touched.
#pragma once

#include "packing.hpp"
#include "threads.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Every second step goes through the weights from the last panel to the first: it begins with those that are still in
// the cache. (One row: 8 % faster for H 64, whose weights fit half into the first cache, and as much for H 256 and the
// second; many rows: no difference.)
inline bool turns_back(Size step) { return step % 2 == 1; }

// What the tape keeps of one step; rows: those of a panel.
struct StepTape {
  Real* kept = nullptr;     // [panel][rows][kept][lane]
  Real* carried = nullptr;  // [panel][rows][lane], the state before the step
  Size rows = 0;
};

// How many rows take some of the `every` steps of the recurrence from the i-th on. They are the first ones in the order
// of lengths, and most of them take the earliest step.
inline Size rows_from(const Schedule& schedule, Size steps, Size batch, bool reverse, Size i, Size every) {
  if (!schedule.active) return batch;
  return schedule.active[reverse ? steps - smaller(i + every, steps) : i];
}

// What the tape keeps of one sequence: all of each step, in the order of time, or the state before every k-th step, in
// the order of the recurrence, of the rows that take this step or one before the next checkpoint.
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

// Which rows have their state set to zero before a step: those that are flagged among the first `count`.
struct Resets {
  const std::uint8_t* flags;  // of the caller's rows; null: none
  Size count;
};

// Counts down the steps until the next look at the interrupt.
class Looks {
 public:
  explicit Looks(Size every) : every_(every) {}
  // Waits for the team as after each step; false: the call is to end.
  bool wait(const Team& team, Interrupt* interrupt) {
    if (--left_ > 0) return team.wait(), true;
    left_ = every_;
    return team.goes_on(interrupt);
  }

 private:
  Size every_, left_ = every_;
};

// A product by one thread, some panels at a time. Once the call is asked to end, the rest is left out.
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
// A small step would feel its division.
template <int G>
GATEWISE_INLINE void multiply_interruptibly(const Product& product, const Team& team, Interrupt* interrupt) {
  interrupt ? multiply_in_parts<G>(product, team, interrupt) : multiply<G>(product);
}

struct Sequence {
  Layer layer;
  Size steps, batch;
  Size first, whole;  // the batch may be a part of a larger one: its rows from the first on, out of so many
  bool reverse;
  Schedule schedule;
  Rows<const Real*> input;    // [T, whole, I]
  Rows<Real*> output;         // [T, whole, R]
  const Real* hidden_before;  // [whole, R]; null: zero
  SequenceTape tape;          // empty: nothing is kept
  const std::int64_t* place =
      nullptr;                  // [T, whole], where in `table` the sums are that the input feeds; null: of input
  const Real* table = nullptr;  // [place][panel][sum][lane]
  Interrupt* interrupt = nullptr;

  Looks looks() const {
    if (!interrupt) return Looks(PTRDIFF_MAX);
    const Size step =
        batch * layer.hidden * (gates_of(layer.cell) * (layer.input + output_of(layer)) + layer.projection);
    return Looks(larger(1, look_operations / larger(1, step)));
  }

  // Whether the rows of one step do not follow on those of the step before.
  bool scattered() const { return !schedule.packed && (schedule.order || batch != whole); }
  // Whether the next step can read h where the output is.
  bool direct() const { return !schedule.order && !schedule.resets; }

  // The i-th step of the recurrence.
  Size time(Size i) const { return reverse ? steps - 1 - i : i; }
  // The lowest of the times of the steps i ... i + count - 1.
  Size lowest_time(Size i, Size count) const { return reverse ? steps - i - count : i; }

  // Where the rows of one time begin in a sequence.
  template <class Pointer>
  Pointer step_of(Rows<Pointer> rows, Size at) const {
    return rows.data + (schedule.packed ? schedule.taken[at] * rows.row : at * rows.step);
  }
  // The rows of a step that are to be zero, from the first on that does not take it.
  Size rows_to_clear(Size i) const { return schedule.packed ? 0 : batch - active(i); }

  // The caller's row of row b.
  Size row(Size b) const { return schedule.order ? schedule.order[b] : first + b; }
  Size length(Size b) const { return schedule.lengths ? schedule.lengths[b] : steps; }
  // How many rows take the i-th step; and how many rows all steps from one time to another have.
  Size active(Size i) const { return schedule.active ? schedule.active[time(i)] : batch; }
  Size rows_between(Size from, Size to) const {
    return schedule.taken ? schedule.taken[to] - schedule.taken[from] : (to - from) * batch;
  }
  // How many steps from the i-th on, at most `most`, have no more than `rows` rows together; at least one. way: 1 on,
  // -1 back.
  Size steps_within(Size i, Size way, Size most, Size rows) const {
    if (!schedule.active) return larger(1, smaller(most, rows / larger(1, batch)));
    Size count = 0;
    do rows -= active(i), i += way, ++count;
    while (count < most && active(i) <= rows);
    return count;
  }

  Resets resets_before(Size i) const {
    const Size at = reverse ? time(i) + 1 : time(i);  // what separates two steps separates them either way
    if (!schedule.resets || at == steps || i == steps) return {nullptr, 0};
    return {schedule.resets + at * whole, reverse ? active(i - 1) : active(i)};
  }

  // h before the i-th step, where the rows of all steps are evenly apart.
  BatchRows hidden_at(Size i, const Real* zeros) const {
    if (i > 0) return {step_of(output, time(i - 1)) + first * output.row, output.row};
    if (hidden_before) return {hidden_before + first * output_of(layer), output_of(layer)};
    return {zeros, 0};
  }
  // The same of one row, wherever it is.
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

  // What a tape of all steps from the given time on has of the i-th step.
  template <class Cell>
  StepTape step_tape(Cell, const StepTape& steps_kept, Size i, Size from_time) const {
    const Size units = panels_of(layer.hidden) * lanes, at = time(i);
    const Size before = schedule.taken ? schedule.taken[at] - schedule.taken[from_time] : (at - from_time) * whole;
    return {steps_kept.kept + (before * units + first * lanes) * Cell::kept,
            Cell::carried ? steps_kept.carried + before * units + first * lanes : nullptr,
            schedule.active ? schedule.active[at] : whole};
  }
  // The rows that the checkpoint before the i-th step has, and the state there, behind the rows of earlier ones.
  Size checkpoint_rows(Size i) const { return rows_from(schedule, steps, whole, reverse, i, tape.checkpoint_every); }
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

// The columns of the panels in `share` between the caller's rows [whole][units] and panels [panel][B][lane]; null rows
// are zero.
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

// The units that the panels in `share` have.
inline Team::Share units_of(Team::Share share, Size units) {
  return {share.begin * lanes, smaller(share.end * lanes, units)};
}

// Zero in the panels [panel][B][lane] of `share` where the state is set to zero before the i-th step.
inline void reset_panels(const Sequence& sequence, Size i, Team::Share share, Real* panels) {
  const Resets resets = sequence.resets_before(i);
  if (!resets.flags) return;
  for (Size b = 0; b < resets.count; ++b)
    if (resets.flags[sequence.row(b)])
      for (Size panel = share.begin; panel < share.end; ++panel)
        Register::broadcast(0).store(panels + (panel * sequence.batch + b) * lanes);
}

}  // namespace gatewise::GATEWISE_KERNEL
