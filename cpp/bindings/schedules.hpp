// Schedules as Python hands them over.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/schedule.hpp"

namespace gatewise {

// A schedule for T steps of B rows, and what owns the memory that it points to.
class HeldSchedule {
 public:
  // lengths: [B] number of steps of each row, T is the largest; null: every row takes all steps.
  // resets: [T, B], each 0 or 1; null: no resets.
  // packed: sequences have only the rows that take a step, as PyTorch packs them. Needs lengths in descending order.
  HeldSchedule(Size steps, Size batch, const std::int64_t* lengths, const std::uint8_t* resets, bool packed = false);

  // The schedule; throws unless it was made for these sizes.
  const Schedule& checked(Size steps, Size batch) const;

 private:
  Size steps_, batch_;
  ScheduleMemory memory_;
  std::vector<std::uint8_t> resets_;
  Schedule schedule_{};
};

}  // namespace gatewise
