#include "schedule.hpp"

#include <algorithm>
#include <numeric>

namespace gatewise {

void RowSchedule::resize(Size steps, Size batch) {
  for (std::vector<Size>* rows : {&order_, &lengths_, &ends_}) rows->resize(static_cast<std::size_t>(batch));
  active_.resize(static_cast<std::size_t>(steps));
  taken_.resize(static_cast<std::size_t>(steps + 1));
}

Schedule RowSchedule::make(const Size* ends, Size steps) {
  std::copy(ends, ends + ends_.size(), ends_.begin());
  std::iota(order_.begin(), order_.end(), Size(0));
  // The most steps first; rows of as many stay in their order, though std::stable_sort would allocate.
  std::sort(order_.begin(), order_.end(),
            [&](Size a, Size b) { return ends[a] != ends[b] ? ends[a] > ends[b] : a < b; });
  std::transform(order_.begin(), order_.end(), lengths_.begin(), [&](Size row) { return ends[row]; });
  auto active = lengths_.end();
  taken_[0] = 0;
  for (Size time = 0; time < steps; ++time) {
    while (active[-1] <= time) --active;
    const auto at = static_cast<std::size_t>(time);
    active_[at] = active - lengths_.begin();
    taken_[at + 1] = taken_[at] + active_[at];
  }
  return any();
}

Schedule RowSchedule::any() const {
  Schedule schedule{};
  schedule.order = order_.data(), schedule.lengths = lengths_.data(), schedule.ends = ends_.data();
  schedule.active = active_.data(), schedule.taken = taken_.data();
  return schedule;
}

}  // namespace gatewise
