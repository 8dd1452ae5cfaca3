#include "network.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "registry.hpp"
#include "threads.hpp"

namespace gatewise {
namespace {

// Rows of a convolution that are gathered at a time: enough for its product, few enough for L2.
constexpr Size convolution_rows = 256;

// Earlier than any step.
constexpr Size never = -(Size(1) << 62);

template <class Pointer>
auto bytes_of(Pointer* data, Size bytes) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const char, char>;
  return static_cast<Byte*>(data) + bytes;
}
template <class Pointer>
auto row_of(Rows<Pointer> rows, Size time, Size row, Size item) {
  return bytes_of(rows.data, (time * rows.step + row * rows.row) * item);
}

// More than any machine has, and well below where sizes overflow.
constexpr double max_elements = 1ll << 46;

void require_possible(const Node& node, Size steps, Size batch) {
  const Size width = std::max({node.input, node.taps * (node.kind == Node::Kind::lookup ? 0 : node.input), node.output,
                               node.kind == Node::Kind::recurrent ? 16 * node.stack.layer->hidden : 0});
  const double rows = static_cast<double>(std::max<Size>(steps, 1)) * static_cast<double>(std::max<Size>(batch, 1));
  if (rows * static_cast<double>(width) > max_elements) throw std::bad_alloc();
}

Size operations_of(const Node& node, Size rows) {
  switch (node.kind) {
    case Node::Kind::recurrent:
      return operations_of(node.stack, rows);
    case Node::Kind::rows:
    case Node::Kind::convolution:
      // An activation takes about as long as eight multiply-adds.
      return rows * node.output * (8 + (node.function.operation == Operation::dense ? node.function.input : 0));
    case Node::Kind::mask:
    case Node::Kind::lookup:
    case Node::Kind::reverse:
      return rows * node.output;  // a copy of a number takes as long
    case Node::Kind::last:
      break;
  }
  return 0;
}

}  // namespace

Size operations_of(const Stack& stack, Size batch) {
  Size operations = 0;
  for (Size i = 0; i < stack.layers * stack.directions; ++i) {
    const Layer& layer = stack.layer[i];
    operations += layer.hidden * (gates_of(layer.cell) * (layer.input + output_of(layer)) + layer.projection);
  }
  return batch * operations;
}

int threads_of(const Kernels& kernels, const Stack& stack, Size steps, Size batch) {
  const Size sequences = stack.layers * stack.directions, hidden = stack.layer->hidden;
  return threads_for(operations_of(stack, batch) / sequences, steps * sequences,
                     std::max((hidden + kernels.lanes - 1) / kernels.lanes, batch / min_rows_per_group(hidden)));
}

bool Network::masks_or_reverses() const {
  return masks() ||
         std::any_of(nodes.begin(), nodes.end(), [](const Node& node) { return node.kind == Node::Kind::reverse; });
}

std::vector<StatePart> Network::parts() const {
  std::vector<StatePart> parts;
  for (const Node& node : nodes) {
    if (node.kind == Node::Kind::recurrent) {
      const Layer& layer = *node.stack.layer;
      const Size sequences = node.stack.layers * node.stack.directions;
      parts.push_back({sequences, output_of(layer)});
      if (has_cell_state(layer.cell)) parts.push_back({sequences, layer.hidden});
    }
    if (node.kind == Node::Kind::convolution && node.is_causal()) parts.push_back({node.left, node.input});
  }
  return parts;
}

Size Network::operations(Size rows) const {
  Size operations = 0;
  for (const Node& node : nodes) operations += operations_of(node, rows);
  return operations;
}

void Run::lay_out(const Network& network, Size steps, Size batch, const Schedule& schedule, int max_threads,
                  const void* const* looked_up) {
  kernels_ = network.kernels;
  item_ = network.item();
  max_steps_ = steps_ = steps;
  batch_ = batch;
  given_schedule_ = schedule_ = schedule;
  ends_with_time_ = true;
  ends_in_time_ = false;
  mask_ = network.masks() ? &network.nodes.front() : nullptr;
  if (mask_) {
    require_possible(*mask_, steps, batch);
    schedule_memory_.resize(steps, batch);
    kept_lengths_.resize(static_cast<std::size_t>(batch));
  }
  const void* const* const sums = looked_up ? looked_up : network.sums[0] ? network.sums : nullptr;
  looks_up_ = sums != nullptr;
  pieces_.clear();
  pieces_.reserve(network.nodes.size());
  Size widest = 0, scratch = 0, part = 0;
  gathered_ = zeros_ = restart_bytes_ = 0;
  const bool passes_table_by = looks_up_ && !looked_up;
  for (std::size_t i = network.first() + passes_table_by; i < network.nodes.size(); ++i) {
    const Node& node = network.nodes[i];
    const Size now = ends_with_time_ ? steps : 1, rows = now * batch;
    Piece piece{};
    piece.node = &node;
    piece.steps = now;
    piece.part = static_cast<int>(part);
    require_possible(node, now, batch);
    if (node.kind == Node::Kind::recurrent) {
      Forward& call = piece.forward;
      call.stack = node.stack;
      call.steps = steps;
      call.batch = batch;
      call.schedule = schedule;
      call.threads = threads_of(*kernels_, node.stack, steps, batch);
      if (max_threads) call.threads = std::min(call.threads, max_threads);
      piece.scratch = kernels_->forward_scratch(call) * item_;
      if (mask_) {  // enough for both: rows of one length, and of different lengths
        Forward uneven = call;
        uneven.schedule = schedule_memory_.unfilled();
        piece.scratch = std::max(piece.scratch, kernels_->forward_scratch(uneven) * item_);
      }
      if (looks_up_ && pieces_.empty()) call.lookup = {nullptr, {sums[0], sums[1]}};
      part += has_cell_state(node.stack.layer->cell) ? 2 : 1;
    } else if (node.kind == Node::Kind::rows || node.kind == Node::Kind::convolution) {
      const bool gathers = node.kind == Node::Kind::convolution;
      piece.block = gathers ? std::min(rows, std::max(batch, convolution_rows)) : rows;
      piece.threads = threads_for(operations_of(node, piece.block), 1, piece.block);
      if (max_threads) piece.threads = std::min(piece.threads, max_threads);
      piece.scratch = kernels_->rows_scratch(node.function, piece.block, piece.threads) * item_;
      if (gathers) {
        gathered_ = std::max(gathered_, piece.block * node.taps * node.input * item_);
        zeros_ = std::max(zeros_, node.input * item_);
        if (schedule.resets) restart_bytes_ = lines(rows * static_cast<Size>(sizeof(Size)));
        part += node.is_causal();
      }
    } else if (node.kind == Node::Kind::last) {
      zeros_ = std::max(zeros_, node.input * item_);
      ends_with_time_ = false;
      ends_in_time_ = node.in_time;
    }
    widest = std::max(widest, rows * node.output);
    scratch = std::max(scratch, piece.scratch);
    pieces_.push_back(piece);
  }
  buffers_in_all_ = std::min<Size>(static_cast<Size>(pieces_.size()) - 1, 2);
  buffer_ = buffers_in_all_ ? lines(widest * item_) : 0;
  gathered_ = lines(gathered_);
  zeros_ = lines(zeros_);
  const Size each = mask_ ? steps * batch : 0;
  kept_bytes_ = lines(each);
  kept_input_bytes_ =
      lines(each * (network.takes_tokens() ? static_cast<Size>(sizeof(std::int64_t)) : network.input() * item_));
  kept_output_bytes_ = ends_with_time_ ? lines(each * network.output() * item_) : 0;
  bytes_ = buffers_in_all_ * buffer_ + gathered_ + zeros_ + restart_bytes_ + kept_bytes_ + kept_input_bytes_ +
           kept_output_bytes_ + scratch;
}

void Run::place(void* memory, const void* const* before, void* const* after) {
  char* next = static_cast<char*>(memory);
  const auto take = [&](Size bytes) { return std::exchange(next, next + bytes); };
  for (Size i = 0; i < buffers_in_all_; ++i) buffers_[i] = take(buffer_);
  gathered_rows_ = take(gathered_);
  zero_row_ = take(zeros_);
  if (zeros_ > 0) std::memset(zero_row_, 0, static_cast<std::size_t>(zeros_));
  restarts_ = restart_bytes_ ? reinterpret_cast<Size*>(take(restart_bytes_)) : nullptr;
  kept_ = reinterpret_cast<std::uint8_t*>(take(kept_bytes_));
  kept_input_ = take(kept_input_bytes_);
  kept_output_ = take(kept_output_bytes_);
  scratch_ = next;
  for (Piece& piece : pieces_) {
    if (piece.node->kind == Node::Kind::recurrent) {
      Forward& call = piece.forward;
      const bool has_cell = has_cell_state(call.stack.layer->cell);
      call.hidden_before = before ? before[piece.part] : nullptr;
      call.hidden_after = after[piece.part];
      call.cell_before = has_cell && before ? before[piece.part + 1] : nullptr;
      call.cell_after = has_cell ? after[piece.part + 1] : nullptr;
      call.scratch = scratch_;
    } else if (piece.node->kind == Node::Kind::convolution && piece.node->is_causal()) {
      piece.before = before ? before[piece.part] : nullptr;
      piece.after = after[piece.part];
    }
  }
}

Status Run::operator()(const NetworkInput& input, Rows<void*> output, Interrupt* interrupt) {
  interrupt_ = interrupt;
  return mask_ ? run_masked(input, output) : run(input, output);
}

// Masked steps are taken out of the sequence, and later ones move up.
Status Run::run_masked(const NetworkInput& input, Rows<void*> output) {
  use(given_schedule_, max_steps_);
  const bool has_masked = find_masked(input);
  if (is_asked(interrupt_)) return Status::interrupted;
  if (!has_masked) return run(input, output);
  const NetworkInput kept = without_masked(input);
  if (is_asked(interrupt_)) return Status::interrupted;
  const Size steps = batch_ ? *std::max_element(kept_lengths_.begin(), kept_lengths_.end()) : 0;
  use(schedule_memory_.make(kept_lengths_.data(), steps), steps);
  const Size units = pieces_.back().node->output;
  const Status status = run(kept, ends_with_time_ ? Rows<void*>{kept_output_, batch_ * units, units} : output);
  use(given_schedule_, max_steps_);
  if (ends_with_time_)
    put_back(output);
  else if (ends_in_time_)
    clear_masked_ends(output);
  return status;
}

void Run::use(const Schedule& schedule, Size steps) {
  schedule_ = schedule;
  steps_ = steps;
  bool has_time = true;
  for (Piece& piece : pieces_) {
    piece.forward.schedule = schedule;
    piece.forward.steps = steps;
    piece.steps = has_time ? steps : 1;
    if (piece.node->kind == Node::Kind::last) has_time = false;
  }
}

// Flags the steps that are not masked. Returns whether any step is masked.
bool Run::find_masked(const NetworkInput& input) {
  const auto is_masked = [&](Size t, Size b) {
    if (input.tokens) return static_cast<double>(input.tokens[t * batch_ + b]) == mask_->masked;
    const auto all_of = [&](const auto* row) {
      using Real = std::decay_t<decltype(*row)>;
      // Denormal numbers are zero to the core, whatever the caller's mode is.
      const auto flushed = [](Real x) { return std::abs(x) < std::numeric_limits<Real>::min() ? Real(0) : x; };
      const Real value = flushed(static_cast<Real>(mask_->masked));
      return std::all_of(row, row + mask_->input, [&](Real x) { return flushed(x) == value; });
    };
    const auto* row = row_of(input.rows, t, b, item_);
    return item_ == 4 ? all_of(reinterpret_cast<const float*>(row)) : all_of(reinterpret_cast<const double*>(row));
  };
  bool found = false;
  for (Size t = 0; t < steps_; ++t) {
    if (is_asked_at(t, mask_->input * item_)) break;
    for (Size b = 0; b < batch_; ++b) {
      const bool masked = t < end(b) && is_masked(t, b);
      kept_[t * batch_ + b] = t < end(b) && !masked;
      found = found || masked;
    }
  }
  return found;
}

// After the end of a row there are zeros, which are valid tokens, too.
NetworkInput Run::without_masked(const NetworkInput& input) {
  const Size bytes = input.tokens ? static_cast<Size>(sizeof(std::int64_t)) : mask_->input * item_;
  std::memset(kept_input_, 0, static_cast<std::size_t>(steps_ * batch_ * bytes));
  std::fill(kept_lengths_.begin(), kept_lengths_.end(), 0);
  for (Size t = 0; t < steps_; ++t) {
    if (is_asked_at(t, bytes)) break;
    for (Size b = 0; b < batch_; ++b) {
      if (!kept_[t * batch_ + b]) continue;
      const void* from =
          input.tokens ? bytes_of<const void>(input.tokens, (t * batch_ + b) * bytes) : row_of(input.rows, t, b, item_);
      Size& count = kept_lengths_[static_cast<std::size_t>(b)];
      std::memcpy(kept_input_ + (count++ * batch_ + b) * bytes, from, static_cast<std::size_t>(bytes));
    }
  }
  if (input.tokens) return {{}, reinterpret_cast<const std::int64_t*>(kept_input_)};
  return {{kept_input_, batch_ * mask_->input, mask_->input}, nullptr};
}

// Copies the outputs of the steps that are not masked to their times.
void Run::put_back(Rows<void*> output) const {
  const Size bytes = pieces_.back().node->output * item_;
  for (Size b = 0; b < batch_; ++b) {
    Size count = 0;
    for (Size t = 0; t < steps_; ++t) {
      char* to = row_of(output, t, b, item_);
      if (kept_[t * batch_ + b])
        std::memcpy(to, kept_output_ + (count++ * batch_ + b) * bytes, static_cast<std::size_t>(bytes));
      else
        std::memset(to, 0, static_cast<std::size_t>(bytes));
    }
  }
}

void Run::clear_masked_ends(Rows<void*> output) const {
  const auto bytes = static_cast<std::size_t>(pieces_.back().node->output * item_);
  for (Size b = 0; b < batch_; ++b)
    if (end(b) == 0 || !kept_[(end(b) - 1) * batch_ + b]) std::memset(row_of(output, 0, b, item_), 0, bytes);
}

Status Run::run(const NetworkInput& input, Rows<void*> output) {
  if (restarts_) find_restarts();
  Rows<const void*> from = input.rows;
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    Piece& piece = pieces_[i];
    const Node& node = *piece.node;
    const Rows<void*> to =
        i + 1 == pieces_.size() ? output : Rows<void*>{buffers_[i % 2], batch_ * node.output, node.output};
    switch (node.kind) {
      case Node::Kind::mask:
        break;  // done by run_masked
      case Node::Kind::recurrent:
        piece.forward.input = from;
        piece.forward.output = to;
        piece.forward.interrupt = interrupt_;
        if (looks_up_ && i == 0) piece.forward.lookup.rows = input.tokens;
        kernels_->forward(piece.forward);
        break;
      case Node::Kind::lookup:
        look_up(node, input.tokens, to);
        break;
      case Node::Kind::rows:
        apply(piece, piece.steps, batch_, from, to);
        break;
      case Node::Kind::convolution:
        convolve(piece, from, to);
        break;
      case Node::Kind::reverse:
        reverse(piece, from, to);
        break;
      case Node::Kind::last:
        take_last(piece, from, to);
        break;
    }
    if (look_whether_asked(interrupt_)) return Status::interrupted;
    from = {to.data, to.step, to.row};
  }
  if (ends_with_time_ && schedule_.row_lengths) clear_after_ends(pieces_.back().node->output, output);
  return Status::complete;
}

// Applies a function to some steps at a time, so that a long call can be interrupted in between.
void Run::apply(const Piece& piece, Size steps, Size batch, Rows<const void*> from, Rows<void*> to) const {
  constexpr Size operations_at_a_time = 16 * look_operations;
  const Size most = std::max<Size>(1, operations_at_a_time / std::max<Size>(1, operations_of(*piece.node, batch)));
  for (Size first = 0; first < steps; first += most) {
    if (first > 0 && look_whether_asked(interrupt_)) return;
    kernels_->apply_rows(piece.node->function, std::min(most, steps - first), batch,
                         {bytes_of(from.data, first * from.step * item_), from.step, from.row},
                         {bytes_of(to.data, first * to.step * item_), to.step, to.row}, scratch_, piece.threads);
  }
}

void Run::look_up(const Node& node, const std::int64_t* tokens, Rows<void*> to) const {
  const Size bytes = node.output * item_;
  for (Size t = 0; t < steps_ && !is_asked_at(t, bytes); ++t)
    for (Size b = 0; b < batch_; ++b)
      std::memcpy(row_of(to, t, b, item_), bytes_of(node.table, tokens[t * batch_ + b] * bytes),
                  static_cast<std::size_t>(bytes));
}

// Whether the call is to end, asked in a loop over time that copies rows of this many bytes. Looks after about 16 MB.
bool Run::is_asked_at(Size time, Size row_bytes) const {
  constexpr Size bytes_between_looks = Size(1) << 24;
  if (!interrupt_) return false;
  const Size every = std::max<Size>(1, bytes_between_looks / std::max<Size>(1, batch_ * row_bytes));
  return time % every == every - 1 && look_whether_asked(interrupt_);
}

void Run::find_restarts() {
  for (Size i = 0; i < steps_ * batch_; ++i)
    restarts_[i] = schedule_.resets[i] ? i / batch_ : i < batch_ ? never : restarts_[i - batch_];
}

// The input of a convolution of a row at a time, which may lie before this call.
const char* Run::row_at(const Piece& piece, Rows<const void*> from, Size at, Size row) const {
  const Node& node = *piece.node;
  if (at >= 0) return row_of(from, at, row, item_);
  return piece.before ? bytes_of(piece.before, ((node.left + at) * batch_ + row) * node.input * item_) : zero_row_;
}

void Run::convolve(const Piece& piece, Rows<const void*> from, Rows<void*> to) {
  const Node& node = *piece.node;
  const Size bytes = node.input * item_, rows = steps_ * batch_, to_row = distance_of(to, steps_, batch_);
  const Size block = to_row >= 0 ? piece.block : batch_;  // else the rows of one time
  for (Size first = 0; first < rows; first += block) {
    if (look_whether_asked(interrupt_)) return;
    const Size count = std::min(block, rows - first);
    char* gathered = gathered_rows_;
    for (Size i = first; i < first + count; ++i) {
      const Size time = i / batch_, row = i % batch_;
      for (Size tap = 0; tap < node.taps; ++tap, gathered += bytes) {
        const Size at = time - node.left + tap * node.dilation;
        const bool is_seen = at < end(row) && !separated(std::min(at, time), std::max(at, time), row);
        std::memcpy(gathered, is_seen ? row_at(piece, from, at, row) : zero_row_, static_cast<std::size_t>(bytes));
      }
    }
    void* const out = to_row >= 0 ? bytes_of(to.data, first * to_row * item_) : row_of(to, first / batch_, 0, item_);
    apply(piece, 1, count, {gathered_rows_, 0, node.taps * node.input}, {out, 0, to_row >= 0 ? to_row : to.row});
  }
  if (node.is_causal()) keep_history(piece, from);
}

// Keeps the last inputs, which the next steps will read. Those from before this call move up, the first one first.
void Run::keep_history(const Piece& piece, Rows<const void*> from) const {
  const Node& node = *piece.node;
  const Size bytes = node.input * item_;
  if (!schedule_.row_lengths && !schedule_.resets && piece.before && steps_ < node.left) {  // all rows at once
    const Size stay = (node.left - steps_) * batch_ * bytes;
    std::memmove(piece.after, bytes_of(piece.before, steps_ * batch_ * bytes), static_cast<std::size_t>(stay));
    for (Size t = 0; t < steps_; ++t)
      for (Size row = 0; row < batch_; ++row)
        std::memcpy(bytes_of(piece.after, stay + (t * batch_ + row) * bytes), row_of(from, t, row, item_),
                    static_cast<std::size_t>(bytes));
    return;
  }
  for (Size row = 0; row < batch_; ++row) {
    const Size length = end(row);
    for (Size i = 0; i < node.left; ++i) {
      const Size at = length - node.left + i;
      const bool is_seen = length == 0 || !separated(at, length - 1, row);
      std::memmove(bytes_of(piece.after, (i * batch_ + row) * bytes),
                   is_seen ? row_at(piece, from, at, row) : zero_row_, static_cast<std::size_t>(bytes));
    }
  }
}

void Run::reverse(const Piece& piece, Rows<const void*> from, Rows<void*> to) const {
  const auto bytes = static_cast<std::size_t>(piece.node->input * item_);
  for (Size t = 0; t < steps_ && !is_asked_at(t, piece.node->input * item_); ++t)
    for (Size row = 0; row < batch_; ++row)
      if (t < end(row)) std::memcpy(row_of(to, t, row, item_), row_of(from, end(row) - 1 - t, row, item_), bytes);
  if (schedule_.row_lengths) clear_after_ends(piece.node->input, to);
}

void Run::take_last(const Piece& piece, Rows<const void*> from, Rows<void*> to) const {
  const Node& node = *piece.node;
  const Size half = node.both_ends ? node.input / 2 * item_ : 0, rest = node.input * item_ - half;
  for (Size row = 0; row < batch_; ++row) {
    const Size length = end(row);
    const char* last = length > 0 ? row_of(from, length - 1, row, item_) : zero_row_;
    const char* first = length > 0 ? row_of(from, 0, row, item_) : zero_row_;
    char* out = row_of(to, 0, row, item_);
    std::memcpy(out, last, static_cast<std::size_t>(rest));
    std::memcpy(out + rest, first + rest, static_cast<std::size_t>(half));
  }
}

void Run::clear_after_ends(Size units, Rows<void*> rows) const {
  for (Size row = 0; row < batch_; ++row)
    for (Size t = end(row); t < steps_; ++t)
      std::memset(row_of(rows, t, row, item_), 0, static_cast<std::size_t>(units * item_));
}

}  // namespace gatewise
