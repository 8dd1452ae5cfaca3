#include "window.hpp"

#include <algorithm>
#include <cstring>

namespace gatewise {
namespace {

std::size_t size(Size value) { return static_cast<std::size_t>(value); }

Size input_bytes_of(const Network& network) {
  return network.takes_tokens() ? static_cast<Size>(sizeof(std::int64_t)) : network.input() * network.item();
}

}  // namespace

Window::Window(const Network* head, const Network& rest, Size steps, Size batch)
    : head_(head),
      rest_(&rest),
      steps_(steps),
      batch_(batch),
      input_bytes_(input_bytes_of(head ? *head : rest)),
      features_(rest.input()),
      feature_bytes_(input_bytes_of(rest)),
      counts_(size(batch)),
      inputs_(size(steps * batch * input_bytes_)),
      operations_(rest.operations(batch) * steps + (head ? head->operations(batch) : 0)),
      saved_counts_(size(batch)),
      saved_inputs_(size(steps * batch * input_bytes_)),
      places_(size(steps * batch)) {
  schedule_memory_.resize(steps, batch);
  std::memset(inputs_.data(), 0, inputs_.bytes());  // rows without inputs are computed along with the others
  Size state_bytes = 0;
  for (const StatePart& part : rest.parts()) state_bytes += part_bytes(part);
  state_ = Buffer(size(state_bytes));
  char* next = static_cast<char*>(state_.data());
  for (const StatePart& part : rest.parts()) {
    state_after_.push_back(next);
    next += part_bytes(part);
  }
  if (first_is_recurrent()) {
    const Stack& stack = rest.nodes.front().stack;
    for (Size d = 0; d < stack.directions; ++d)
      sums_[d] = Buffer(size(steps * batch * rest.kernels->input_sums_size(stack.layer[d]) * rest.item()));
  } else {
    gathered_ = Buffer(size(steps * batch * feature_bytes_));
    std::memset(gathered_.data(), 0, gathered_.bytes());  // zero, also as a token, after the end of a row
  }
  if (head) {
    feature_rows_ = Buffer(size(steps * batch * feature_bytes_));
    head_run_.lay_out(*head, 1, batch, {}, 1);
    head_scratch_ = Buffer(size(head_run_.bytes()));
    head_run_.place(head_scratch_.data(), nullptr, nullptr);
  }
  // Room for a full window, whether all rows have as many inputs or not.
  Size bytes = 0;
  for (const Schedule& schedule : {Schedule{}, schedule_memory_.unfilled()}) {
    lay_out_rest(steps, schedule);
    bytes = std::max(bytes, run_.bytes());
  }
  scratch_ = Buffer(size(bytes));
}

void Window::take_inputs(const Window& other) {
  std::memcpy(inputs_.data(), other.inputs_.data(), inputs_.bytes());
  counts_ = other.counts_;
  next_ = other.next_;
  const Size most = *std::max_element(counts_.begin(), counts_.end());
  for (Size last = 1; last <= most; ++last) make_features(slot(last));
}

void Window::lay_out_rest(Size steps, const Schedule& schedule) {
  const void* const sums[2] = {sums_[0].data(), sums_[1].data()};
  run_.lay_out(*rest_, steps, batch_, schedule, 1, first_is_recurrent() ? sums : nullptr);
}

// Computes what the rest reads for the inputs in a slot.
void Window::make_features(Size slot) {
  const char* features = input_at(slot, 0);
  if (head_) {
    char* output = static_cast<char*>(feature_rows_.data()) + slot * batch_ * feature_bytes_;
    NetworkInput input{};
    if (head_->takes_tokens())
      input.tokens = reinterpret_cast<const std::int64_t*>(features);
    else
      input.rows = {features, 0, head_->input()};
    head_run_(input, {output, 0, features_}, nullptr);
    features = output;
  }
  if (!first_is_recurrent()) return;
  const Stack& stack = rest_->nodes.front().stack;
  for (Size d = 0; d < stack.directions; ++d) {
    const Size row = rest_->kernels->input_sums_size(stack.layer[d]) * rest_->item();
    rest_->kernels->input_sums(stack.layer[d], batch_, features, features_,
                               static_cast<char*>(sums_[d].data()) + slot * batch_ * row);
  }
}

void Window::remember(const void* inputs, Size row_bytes) {
  for (Size row = 0; row < batch_; ++row)
    std::memcpy(input_at(next_, row), static_cast<const char*>(inputs) + row * row_bytes, size(input_bytes_));
  make_features(next_);
  next_ = (next_ + 1) % steps_;
  for (Size& count : counts_) count = std::min(count + 1, steps_);
}

Status Window::operator()(const NetworkInput& input, Rows<void*> output, Size steps, const std::uint8_t* resets,
                          Interrupt* interrupt) {
  const bool may_take_long = interrupt && operations_ * std::min(steps, look_operations) >= look_operations;
  if (may_take_long) save_inputs();
  for (Size t = 0; t < steps; ++t) {
    for (Size row = 0; row < batch_; ++row)
      if (resets && resets[t * batch_ + row]) forget(row);
    const Size item = rest_->item();
    if (input.tokens)
      remember(input.tokens + t * batch_, input_bytes_);
    else
      remember(static_cast<const char*>(input.rows.data) + t * input.rows.step * item, input.rows.row * item);
    const Rows<void*> rows{static_cast<char*>(output.data) + t * output.step * item, 0, output.row};
    if (step(rows, may_take_long ? interrupt : nullptr) == Status::complete) continue;
    restore_inputs(t + 1);
    return Status::interrupted;
  }
  return Status::complete;
}

void Window::save_inputs() {
  std::memcpy(saved_inputs_.data(), inputs_.data(), inputs_.bytes());
  saved_counts_ = counts_;
  saved_next_ = next_;
}

// Undoes this many steps.
void Window::restore_inputs(Size steps) {
  std::memcpy(inputs_.data(), saved_inputs_.data(), inputs_.bytes());
  counts_ = saved_counts_;
  next_ = saved_next_;
  for (Size i = 0; i < std::min(steps, steps_); ++i) make_features((next_ + i) % steps_);
}

Status Window::step(Rows<void*> output, Interrupt* interrupt) {
  const auto [shortest, longest] = std::minmax_element(counts_.begin(), counts_.end());
  const Size steps = *longest;
  if (*shortest < steps || steps != laid_out_steps_) {
    lay_out_rest(steps, *shortest < steps ? schedule_memory_.make(counts_.data(), steps) : Schedule{});
    if (size(run_.bytes()) > scratch_.bytes()) scratch_ = Buffer(size(run_.bytes()));
    run_.place(scratch_.data(), nullptr, state_after_.data());
    laid_out_steps_ = *shortest < steps ? 0 : steps;
  }
  NetworkInput window{};
  if (first_is_recurrent()) {
    for (Size t = 0; t < steps; ++t)
      for (Size row = 0; row < batch_; ++row) {
        const Size count = counts_[size(row)];
        places_[size(t * batch_ + row)] = t < count ? slot(count - t) * batch_ + row : 0;
      }
    window.tokens = places_.data();
  } else {
    const char* from = static_cast<const char*>(head_ ? feature_rows_.data() : inputs_.data());
    char* to = static_cast<char*>(gathered_.data());
    for (Size t = 0; t < steps; ++t)
      for (Size row = 0; row < batch_; ++row, to += feature_bytes_) {
        const Size count = counts_[size(row)];
        if (t < count) std::memcpy(to, from + (slot(count - t) * batch_ + row) * feature_bytes_, size(feature_bytes_));
      }
    if (rest_->takes_tokens())
      window.tokens = static_cast<const std::int64_t*>(gathered_.data());
    else
      window.rows = {gathered_.data(), batch_ * features_, features_};
  }
  return run_(window, output, interrupt);
}

}  // namespace gatewise
