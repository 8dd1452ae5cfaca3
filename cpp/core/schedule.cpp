#include "schedule.hpp"

#include <algorithm>
#include <numeric>

namespace gatewise {

void ScheduleMemory::resize(Size steps, Size batch) {
  for (std::vector<Size>* rows : {&order_, &sorted_lengths_, &row_lengths_})
    rows->resize(static_cast<std::size_t>(batch));
  active_.resize(static_cast<std::size_t>(steps));
  rows_before_.resize(static_cast<std::size_t>(steps + 1));
}

Schedule ScheduleMemory::make(const Size* lengths, Size steps) {
  std::copy(lengths, lengths + row_lengths_.size(), row_lengths_.begin());
  std::iota(order_.begin(), order_.end(), Size(0));
  // Longest first. Rows of equal length keep their order; std::stable_sort would do that, but allocates.
  std::sort(order_.begin(), order_.end(),
            [&](Size a, Size b) { return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b; });
  std::transform(order_.begin(), order_.end(), sorted_lengths_.begin(), [&](Size row) { return lengths[row]; });
  auto active = sorted_lengths_.end();
  rows_before_[0] = 0;
  for (std::size_t time = 0; time < static_cast<std::size_t>(steps); ++time) {
    while (active[-1] <= static_cast<Size>(time)) --active;
    active_[time] = active - sorted_lengths_.begin();
    rows_before_[time + 1] = rows_before_[time] + active_[time];
  }
  return unfilled();
}

Schedule ScheduleMemory::unfilled() const {
  Schedule schedule{};
  schedule.order = order_.data();
  schedule.sorted_lengths = sorted_lengths_.data();
  schedule.row_lengths = row_lengths_.data();
  schedule.active = active_.data();
  schedule.rows_before = rows_before_.data();
  return schedule;
}

}  // namespace gatewise
