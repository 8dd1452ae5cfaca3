// Which rows take which steps, and where their state starts anew, as Python hands it over.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/schedule.hpp"

namespace gatewise {

// Owns what a Schedule points to, for T steps of B rows.
class Plan {
 public:
  // lengths [B], the largest T, or null; resets [T, B], each 0 or 1, or null; packed: sequences have only the rows that
  // take a step, whose lengths must descend
  Plan(Size steps, Size batch, const std::int64_t* lengths, const std::uint8_t* resets, bool packed = false);
  const Schedule& schedule(Size steps, Size batch) const;  // throws unless it was made for these

 private:
  Size steps_, batch_;
  RowSchedule rows_;
  std::vector<std::uint8_t> resets_;
  Schedule schedule_{};
};

}  // namespace gatewise
