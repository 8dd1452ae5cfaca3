#include "schedule.hpp"

#include <algorithm>
#include <numeric>

namespace gatewise {

void ScheduleMemory::resize(Size steps, Size batch) {
  for (std::vector<Size>* rows : {&order_, &lengths_, &ends_}) rows->resize(static_cast<std::size_t>(batch));
  active_.resize(static_cast<std::size_t>(steps));
  taken_.resize(static_cast<std::size_t>(steps + 1));
}

Schedule ScheduleMemory::make(const Size* lengths, Size steps) {
  std::copy(lengths, lengths + ends_.size(), ends_.begin());
  std::iota(order_.begin(), order_.end(), Size(0));
  // Longest first. Rows of equal length keep their order; std::stable_sort would do that, but allocates.
  std::sort(order_.begin(), order_.end(),
            [&](Size a, Size b) { return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a < b; });
  std::transform(order_.begin(), order_.end(), lengths_.begin(), [&](Size row) { return lengths[row]; });
  auto active = lengths_.end();
  taken_[0] = 0;
  for (std::size_t time = 0; time < static_cast<std::size_t>(steps); ++time) {
    while (active[-1] <= static_cast<Size>(time)) --active;
    active_[time] = active - lengths_.begin();
    taken_[time + 1] = taken_[time] + active_[time];
  }
  return unfilled();
}

Schedule ScheduleMemory::unfilled() const {
  Schedule schedule{};
  schedule.order = order_.data();
  schedule.lengths = lengths_.data();
  schedule.ends = ends_.data();
  schedule.active = active_.data();
  schedule.taken = taken_.data();
  return schedule;
}

}  // namespace gatewise
